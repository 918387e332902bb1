"""A stage's settings on the model while it trains, and everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import nn

from ltepass.api import lower, unlower
from ltepass.config import Mode
from ltepass.routed.routed import Routed, routers_of
from ltepass.routed.router import Router
from ltepass.routed.undo import all_or_nothing, undisturbed
from ltepass.training.lora import add_lora, merge_lora
from ltepass.training.settings import LTESettings
from ltepass.training.stages import Stage, begin_stage


@contextmanager
def stage_options(model: nn.Module, lte: LTESettings, stage: Stage) -> Iterator[None]:
    """Which parameters learn, low-rank updates, what routers keep, what computes; as before, and merged, at the end.

    What was learned stays, also where training fails or is interrupted; the mode is then the one before.
    """
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [(router, router.mode) for router in routers_of(model)]
    through_op = lte.through_op and stage == "hard"
    begun = False
    try:
        begun = all_or_nothing(model, partial(_begin, model, lte, stage, through_op))
        yield
        modes = []
    finally:
        with undisturbed(), ExitStack() as last:  # last in, first out; each runs whatever became of the others
            if begun:
                last.callback(_reset, model, flags, modes)
                last.callback(merge_lora, model)
            if begun and through_op:
                last.callback(unlower, model)


def _begin(model: nn.Module, lte: LTESettings, stage: Stage, through_op: bool) -> bool:
    begin_stage(model, stage, trainable=lte.trainable, straight_through=lte.straight_through)
    if lte.trainable == "lora":
        add_lora(Routed.of(model, "stage options"), lte.lora_rank)
    for router in Routed.of(model, "stage options").routers:
        router.recorder.count_inactive, router.recorder.share_neighbours = lte.hold, lte.union > 0
    if through_op:
        lower(model, scope="ffn")
    return True


def _reset(model: nn.Module, flags: dict[str, bool], modes: list[tuple[Router, Mode]]) -> None:
    for router in routers_of(model):
        router.straight_through = router.recorder.count_inactive = router.recorder.share_neighbours = False
    for name, p in model.named_parameters():
        p.requires_grad_(flags.get(name, p.requires_grad))
    for router, mode in modes:
        router.mode = mode
