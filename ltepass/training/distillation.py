"""The dense teacher of `LTESettings.distill`, and how far the model is from what it teaches."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ltepass.routed.batches import inputs_of
from ltepass.routed.routed import routers_of
from ltepass.routed.soft_losses import kl_from
from ltepass.routed.token_hooks import hooks_of


def dense_teacher(model: nn.Module, teacher: nn.Module | None) -> nn.Module:
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
