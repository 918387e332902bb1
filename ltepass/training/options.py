"""A stage's settings on the model while it trains, and everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ltepass.lowering import lower, unlower
from ltepass.sites import routers_of
from ltepass.training.lora import add_lora, merge_lora
from ltepass.training.settings import LTESettings
from ltepass.training.stages import Stage, begin_stage


@contextmanager
def stage_options(model: nn.Module, lte: LTESettings, stage: Stage) -> Iterator[None]:
    """Which parameters learn, low-rank updates, what routers keep, what computes; as before, and merged, at the end."""
    through_op = lte.through_op and stage == "hard"
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
        if through_op:
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
