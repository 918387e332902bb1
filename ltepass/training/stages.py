"""What the two stages of the paper (section 4.3) mean for a model, whoever runs the steps: Trainer or an own loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ltepass.config import Budget
from ltepass.errors import TrainingError
from ltepass.measure.sparsity import hard_sparsity
from ltepass.routed.padding import IGNORED
from ltepass.routed.proxy import ProxyRouter, encode
from ltepass.routed.recording import RecordedCall, Recorder
from ltepass.routed.routed import Routed
from ltepass.routed.sites import require_whole
from ltepass.routed.token_rows import Part
from ltepass.routed.undo import verb
from ltepass.sparsity.cuts import place_cuts
from ltepass.sparsity.modes import switch
from ltepass.sparsity.thresholds import place_thresholds, update_table
from ltepass.training.settings import Trainable

Stage = Literal["soft", "hard"]


@verb
def begin_stage(
    model: nn.Module, stage: Stage, *, trainable: Trainable = "all", straight_through: bool = False
) -> None:
    """Begin one of the two stages: modes and what learns. Call it before the optimizer is made. Paper section 4.3.

    Arguments:
        model: a transformed model, not lowered.
        stage: "soft", where everything learns, or "hard": routers frozen, so the task loss trains what is left.
        trainable: "all" leaves the flags of what is no router as they are; "routers" and "lora" freeze it.
        straight_through: routers learn in the hard stage too, as they do with "routers".
    Returns: None.
    Raises: NotTransformedError, LoweredError, ShardedError.
    Example:
        >>> ltepass.begin_stage(model, "hard")
        >>> model.model.layers[0].mlp.router.weight.requires_grad
        False
    """
    routed = Routed.trained(model, f"the {stage} stage")
    require_whole(model, f"the {stage} stage", flat_only=True)
    switch(routed, stage)
    learns_hard = straight_through or trainable == "routers"
    if trainable != "all":
        model.requires_grad_(False)
    for router in routed.routers:  # alone: what PEFT keeps beside it stays frozen
        router.straight_through = stage == "hard" and learns_hard
        router.requires_grad_(stage == "soft" or learns_hard)


@verb
def settle(
    model: nn.Module, batches: Iterable[Any], sparsity: float, *, budget: Budget | None = None
) -> dict[str, float]:
    """End a stage: new sparsity table, thresholds at `sparsity`, hard mode.

    The routers' weights stay; only their thresholds move, and the cuts of hidden units where the model has them. A
    proxy's codes are made anew of what the weights have become.

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
        if isinstance(router, ProxyRouter):  # where an adapter stands in the weights' place, codes stay as they are
            encode(routed.model, site, router)
    for _ in range(2):  # the second pass sees the inputs that the moved thresholds make
        update_table(routed, batches)
        place_thresholds(routed, sparsity)
    place_cuts(routed, batches)
    return hard_sparsity(routed, batches)


def hold(routed: Routed, shares: Tensor, sparsity: float, *, budget: Budget | None = None, gain: float = 1.0) -> None:
    """Move thresholds a little towards a sparsity. shares: [n_sites], inactive share of each in the last step.

    budget: as in `settle`. gain: logits per unit of error; at logits of unit spread the error shrinks by about
    gain / 3 a step.
    """
    budget = budget or routed.config["budget"]
    error = sparsity - (shares.mean().expand_as(shares) if budget == "model" else shares)
    for router, missing in zip(routed.routers, error, strict=True):
        router.threshold.add_((gain * missing).to(router.threshold.device))


def held_out_perplexity(model: Any, batches: Iterable[Any]) -> float | None:
    """exp of the mean loss over label tokens in the present mode; None where no batch has labels of tokens."""
    was_training = model.training
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            if not isinstance(batch, Mapping) or "labels" not in batch or batch["labels"].dim() < 2:
                continue
            tokens = float(label_mask(batch["labels"], shifted=shifts_labels(model)).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    model.train(was_training)
    return math.exp(min(total / count, 80.0)) if count else None


@dataclass(frozen=True)
class Auxiliary:
    """Sums over label tokens of the losses and of hard and soft sparsity, means over layers; `tokens` counts them.

    A layer that is called several times in a forward counts as one, with the mean over its calls.
    """

    efficiency: Tensor
    separability: Tensor
    union: Tensor
    soft_sparsity: Tensor
    sparsity: Tensor
    tokens: Tensor


def clear_auxiliary(routed: Routed) -> None:
    for router in routed.all_routers():
        router.recorder.calls.clear()


def take_auxiliary(model: nn.Module, mask: Tensor | None) -> Auxiliary:
    """Collect the losses that soft forwards left on the routers, and clear them. Paper section 4.3.

    Arguments:
        model: a transformed model after a forward in soft mode, with gradients.
        mask: bool [B, T], True at tokens whose prediction counts; None counts all. Padding never counts.
    Returns: sums over tokens, fp32 scalars: `efficiency` and `separability` (the paper's), `union`, `soft_sparsity`,
        `sparsity`; divide by `tokens`.
    Raises: TrainingError where a router kept nothing: its forward ran without gradients, as reentrant checkpointing
        does, and its loss would silently be lost.
    Example:
        >>> ltepass.begin_stage(model, "soft")
        >>> task = model(input_ids=ids, labels=ids).loss
        >>> auxiliary = ltepass.take_auxiliary(model, ltepass.label_mask(ids))
        >>> loss = task + (0.3 * auxiliary.efficiency + 1e-4 * auxiliary.separability) / auxiliary.tokens
        >>> loss.backward()
    """
    sites = [_taken(router.recorder, mask) for router in Routed.of(model, "take_auxiliary").routers]
    predicting = [site for site in sites if site.part != "encoder"] or sites
    tokens = predicting[-1].tokens
    total = torch.stack([site.sums * (tokens / site.counted.clamp_min(1)) for site in sites]).mean(0)
    efficiency, separability, union, soft, hard = total
    return Auxiliary(efficiency, separability, union, soft.detach(), hard.detach(), tokens)


class _Taken(NamedTuple):
    """Of one site: sums [5] over the tokens of all calls, how many those are, and how many of them are different."""

    sums: Tensor
    counted: Tensor
    tokens: Tensor
    part: Part


def _taken(recorder: Recorder, mask: Tensor | None) -> _Taken:
    calls = list(recorder.calls)
    if not calls or any(call.losses is None for call in calls):
        raise TrainingError(
            "a router's soft forward left no auxiliary loss: it ran without gradients; expected a plain forward or "
            "non-reentrant checkpointing; pass use_reentrant=False to it"
        )
    recorder.calls.clear()
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    first: dict[int, Tensor] = {}  # of each forward
    for call in calls:
        weights = _weights(recorder, call, mask)
        sums.append(_rows(call) @ weights)
        counts.append(weights.sum())
        first.setdefault(call.forward.number, counts[-1])  # a later call in it has the same tokens
    counted, tokens = torch.stack(counts).sum(), torch.stack(list(first.values())).sum()
    return _Taken(torch.stack(sums).sum(0), counted, tokens, calls[-1].forward.part)


def _rows(call: RecordedCall) -> Tensor:
    """[5, n]: efficiency, separability, union, soft and hard sparsity."""
    assert call.losses is not None
    efficiency, separability, union, soft = call.losses
    before = call.forward.after_tokens(union.shape)
    union = union if before is None else union * before  # padding is nobody's neighbour
    return torch.stack([part.reshape(-1) for part in (efficiency, separability, union, soft, call.inactive)])


def _weights(recorder: Recorder, call: RecordedCall, mask: Tensor | None = None) -> Tensor:
    """[n] fp32: 1 at the rows of a call that are tokens, and whose prediction counts where a mask [B, T] says so."""
    shape = call.inactive.shape
    rows = recorder.rows
    real = call.forward.tokens(shape) if rows is None else rows.mask(shape, call.forward)
    weights = torch.ones_like(call.inactive) if real is None else real.to(call.inactive)
    if mask is not None and call.forward.part != "encoder":  # labels say nothing of what an encoder reads
        if mask.numel() == weights.numel():
            weights = weights * mask.reshape(shape).to(weights)
        elif real is None:
            raise TrainingError(
                f"a router saw {weights.numel()} tokens and the labels have {mask.numel()}; expected one token a "
                "label; train with one sequence of labels for the same sequence of inputs"
            )
    return weights.reshape(-1)


def inactive_shares(routed: Routed) -> Tensor:
    """[n_sites]: mean hard sparsity of each site's tokens in the forwards with gradients since, and forget it."""
    shares = []
    for recorder in (router.recorder for router in routed.routers):
        if not recorder.calls:
            raise TrainingError(
                "a router kept no sparsity: its forward ran without gradients; expected a plain forward"
            )
        weights = torch.cat([_weights(recorder, call) for call in recorder.calls])
        inactive = torch.cat([call.inactive.reshape(-1) for call in recorder.calls])
        shares.append(inactive @ weights / weights.sum().clamp_min(1))
        recorder.calls.clear()
    return torch.stack(shares)


def shifts_labels(model: nn.Module) -> bool:
    """Whether a position predicts the next label, as in a decoder alone; an encoder-decoder's predicts its own."""
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def label_mask(labels: Tensor, *, shifted: bool = True) -> Tensor:
    """Which positions count in a causal loss: those whose next label is not -100.

    Arguments:
        labels: [B, T] int64.
        shifted: False where a position predicts its own label, as in an encoder-decoder.
    Returns: bool [B, T].
    Raises: nothing.
    Example:
        >>> ltepass.label_mask(torch.tensor([[5, 6, -100]]))
        tensor([[ True, False, False]])
    """
    if not shifted:
        return labels != IGNORED
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[..., :-1] = labels[..., 1:] != IGNORED
    return mask
