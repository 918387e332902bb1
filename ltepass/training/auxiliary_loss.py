"""The losses and the sparsity that forwards left on the routers, collected over the tokens that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltepass.errors import TrainingError
from ltepass.routed.batches import Part
from ltepass.routed.recorded_calls import RecordedCall, Recorder
from ltepass.routed.routed import Routed


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
    routed = Routed.of(model, "take_auxiliary")
    sites = [_taken(router.recorder, mask) for router in routed.routers]
    predicting = [site for site in sites if site.part != "encoder"] or sites
    tokens = predicting[-1].tokens
    total = torch.stack([site.sums * (tokens / site.counted.clamp_min(1)) for site in sites]).mean(0)
    efficiency, separability, union, soft, hard = total
    _forget(routed)  # not before: a refused call can be made again
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


def _forget(routed: Routed) -> None:
    for router in routed.routers:
        router.recorder.calls.clear()


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
    _forget(routed)
    return torch.stack(shares)
