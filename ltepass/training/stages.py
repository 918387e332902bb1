"""What the two stages of the paper (section 4.3) mean for a model, whoever runs the steps: Trainer or an own loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ltepass.config import Budget, Mode
from ltepass.measure.sparsity import hard_sparsity
from ltepass.progress import steps
from ltepass.routed.modes import switch
from ltepass.routed.proxy_router import ProxyRouter, encode
from ltepass.routed.routed import Routed, require_whole, routers_of
from ltepass.routed.router import Router
from ltepass.routed.undo import all_or_nothing, undisturbed, verb
from ltepass.sparsity.cuts import place_cuts
from ltepass.sparsity.thresholds import place_thresholds, update_table
from ltepass.training.labels import label_mask, shifts_labels
from ltepass.training.lora import add_lora, merge_lora, require_bare_linears
from ltepass.training.settings import LTESettings, Trainable
from ltepass.transform_and_lower import lower, unlower

Stage = Literal["soft", "hard"]


@verb
def begin_stage(
    model: nn.Module, stage: Stage, *, trainable: Trainable = "all", straight_through: bool = False
) -> None:
    """Begin one of the two stages: modes and what learns. Call it before the optimizer is made. Paper section 4.3.

    Arguments:
        model: a transformed model, not lowered.
        stage: "soft", where everything learns, or "hard": routers frozen, so the task loss trains what is left.
        trainable: "all" leaves the flags of what is no router as they are; "routers" and "lora" freeze it. With
            inactive="low_bit" the FFNs' own weights are frozen too: codes stand in their place.
        straight_through: routers learn in the hard stage too, as they do with "routers".
    Returns: None.
    Raises: NotTransformedError, LoweredError, ShardedError, ConfigError ("lora" with inactive="low_bit" or
        with weights in int8, an adapter on an FFN's linears with inactive="low_bit").
    Example:
        >>> ltepass.begin_stage(model, "hard")
        >>> model.model.layers[0].mlp.router.weight.requires_grad
        False
    """
    routed = Routed.trained(model, f"the {stage} stage")
    require_whole(model, f"the {stage} stage", flat_only=True)
    _reshard(model)
    if trainable == "lora":  # adds to linears
        routed.require_gates('trainable="lora"')
        routed.require_floats('trainable="lora"')
    if routed.tiered:
        require_bare_linears(routed)
    switch(routed, stage)
    learns_hard = straight_through or trainable == "routers"
    if trainable != "all":
        model.requires_grad_(False)
    elif routed.tiered:
        for rows in (rows for site in routed.sites for rows in site.neurons):
            routed.model.get_parameter(rows.param).requires_grad_(False)
    for router in routed.routers:  # alone: what PEFT keeps beside it stays frozen
        router.straight_through = stage == "hard" and learns_hard
        router.requires_grad_(stage == "soft" or learns_hard)


def _reshard(model: nn.Module) -> None:
    """After a forward the root of a model that `fully_shard` cut up holds whole parameters for a time: flags that are
    set then, and an optimizer that is made then, would be about those.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if module.__dict__.get("_is_fsdp_managed_module") and callable(reshard):
            reshard()


@verb
def settle(
    model: nn.Module, batches: Iterable[Any], sparsity: float, *, budget: Budget | None = None
) -> dict[str, float]:
    """End a stage: new sparsity table, thresholds at `sparsity`, hard mode.

    The routers' weights stay; only their thresholds move, and the cuts of hidden units where the model has them. A
    proxy's codes are made anew of what the weights have become; those of tiers, whose weights do not learn, stay.

    Arguments:
        model: a transformed model, not lowered.
        batches: mappings of model inputs, or token id tensors, that were not trained on.
        sparsity: share of inactive experts, in [0, 1).
        budget: "layer" brings every site to it; "model" the mean over sites, by one threshold that all share; None
            takes the config's, any other becomes it, so that `set_sparsity` goes on like this.
    Returns: the hard sparsity on `batches`, by site name.
    Raises: ConfigError, NotTransformedError, LoweredError, CalibrationError.
    Example:
        >>> shares = ltepass.settle(model, batches, 0.6)
        >>> all(0.5 < share < 0.7 for share in shares.values())
        True
    """
    batches = list(batches)
    routed = Routed.trained(model, "settle")
    routed.config["budget"] = budget or routed.config["budget"]
    switch(routed, "hard")
    for site, router in routed:
        # Where an adapter stands in the weights' place, codes stay as they are; tiers' weights have not learned.
        if isinstance(router, ProxyRouter) and not router.tiered:
            encode(routed.model, site, router)
    for _ in range(2):  # the second pass sees the inputs that the moved thresholds make
        update_table(routed, batches)
        place_thresholds(routed, sparsity)
    place_cuts(routed, batches)
    return hard_sparsity(routed, batches)


def held_out_perplexity(model: Any, batches: Iterable[Any]) -> float | None:
    """What a stage's end is judged by: exp of the mean loss over label tokens in the present mode; None where no batch
    has any.
    """
    was_training = model.training
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in steps("losses of batches", batches):
            if not isinstance(batch, Mapping) or "labels" not in batch or batch["labels"].dim() < 2:
                continue
            tokens = float(label_mask(batch["labels"], shifted=shifts_labels(model)).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    model.train(was_training)
    return math.exp(min(total / count, 80.0)) if count else None


@contextmanager
def stage_options(model: nn.Module, lte: LTESettings, stage: Stage) -> Iterator[None]:
    """Which parameters learn, low-rank updates, what routers keep, what computes; as before, and merged, at the end.

    What was learned stays, also where training fails or is interrupted; the mode is then the one before.
    """
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [(router, router.mode) for router in routers_of(model)]
    through_op = lte.through_op and stage == "hard"
    if through_op:
        Routed.of(model, "stage options").require_gates("through_op")
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
    """Before a stage: what `stage_options` says."""
    begin_stage(model, stage, trainable=lte.trainable, straight_through=lte.straight_through)
    if lte.trainable == "lora":
        add_lora(Routed.of(model, "stage options"), lte.lora_rank)
    for router in Routed.of(model, "stage options").routers:
        router.recorder.count_inactive, router.recorder.share_neighbours = lte.hold, lte.union > 0
    if through_op:
        lower(model, scope="ffn")
    return True


def _reset(model: nn.Module, flags: dict[str, bool], modes: list[tuple[Router, Mode]]) -> None:
    """After a stage: flags, modes and what routers record as before."""
    for router in routers_of(model):
        router.straight_through = router.recorder.count_inactive = router.recorder.share_neighbours = False
    for name, p in model.named_parameters():
        p.requires_grad_(flags.get(name, p.requires_grad))
    for router, mode in modes:
        router.mode = mode
