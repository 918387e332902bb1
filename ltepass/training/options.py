"""A stage's settings on the model while it trains, and everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ltepass.kernels import routed_ffn_cpu
from ltepass.kernels.routed_ffn_backward import LEAST_GROUP, MOST_ACTIVE
from ltepass.lowering import lower, unlower, why_not
from ltepass.sites import require_state, routers_of
from ltepass.training.lora import add_lora, merge_lora
from ltepass.training.settings import LTESettings
from ltepass.training.stages import Stage, begin_stage


def op_pays(model: nn.Module, lte: LTESettings, target: float) -> bool:
    """Whether the hard stage is faster through the sparse op and its backward, as far as the model decides it."""
    sites = require_state(model, "training").sites
    parameters = list(model.parameters())
    return (
        lte.trainable == "all"
        and not lte.straight_through
        and 1.0 - target <= MOST_ACTIVE
        and all(s.kind == "aligned" and s.group_size >= LEAST_GROUP and why_not(model, s) is None for s in sites)
        and all(type(p) is nn.Parameter and p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
        and routed_ffn_cpu.load()
    )


@contextmanager
def stage_options(model: nn.Module, lte: LTESettings, stage: Stage, *, through_op: bool = False) -> Iterator[None]:
    """Which parameters learn, low-rank updates, what routers keep; LoRA is merged and the flags restored at the end.

    through_op: a hard stage runs on the lowered model.
    """
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    begin_stage(model, stage, trainable=lte.trainable, straight_through=lte.straight_through)
    if lte.trainable == "lora":
        routers = [p for p in model.parameters() if p.requires_grad]
        add_lora(model, lte.lora_rank)
        for p in routers:
            p.requires_grad_(True)
    for router in routers_of(model):
        router.count_inactive, router.share_neighbours = lte.hold, lte.union > 0
    try:
        if through_op and stage == "hard":
            lower(model, scope="ffn")
        yield
    finally:
        if through_op:
            unlower(model)
        merge_lora(model)
        for router in routers_of(model):
            router.straight_through = router.count_inactive = router.share_neighbours = False
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
