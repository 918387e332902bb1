"""The dense teacher of `LTESettings.distill`, and how far the model is from what it teaches."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ltepass.routed.batches import inputs_of
from ltepass.routed.routed import routers_of
from ltepass.routed.token_masks import hooks_of


def dense_teacher(model: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """The teacher that was given, or a copy of the model with every neuron active; in evaluation, and it learns
    nothing.
    """
    if teacher is None:
        teacher = copy.deepcopy(model)
        for router in routers_of(teacher):
            router.mode = "dense"
    return teacher.eval().requires_grad_(False)


def divergence(
    teacher: nn.Module, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(sum of KL over the positions whose prediction counts, their number). logits: of the last forward."""
    args, named = inputs_of(teacher, inputs)
    with torch.no_grad():
        taught = teacher(*args, **named).logits
    kl = kl_from(taught, logits)
    hooks = hooks_of(model)
    real = None if hooks is None else hooks.output.tokens(kl.shape)
    weights = torch.ones_like(kl) if real is None else real.to(kl)
    weights = weights if mask is None else weights * mask.to(kl)
    return (kl * weights).sum(), weights.sum()


def kl_from(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) in nats per position: logits [..., V] of any float dtype -> [...] fp32."""
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
