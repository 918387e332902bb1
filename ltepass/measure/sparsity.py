"""How sparse a model really is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltepass.measure.quality import perplexity
from ltepass.routed import token_masks
from ltepass.routed.batches import Batch, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.observers import not_finite, on_logits, require_seen
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import Tally, record_logits
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import verb
from ltepass.sparsity.thresholds import set_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@verb
def measure_sparsity(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """How sparse hard gates are, over all tokens of the batches, whatever the present mode.

    Arguments:
        model: a transformed model, not lowered.
        batches: mappings of model inputs, or token id tensors; padding is not counted.
    Returns: share of inactive neurons in [0, 1], by site name.
    Raises: NotTransformedError, LoweredError, CalibrationError (no tokens seen, or scores not finite).
    Example:
        >>> ltepass.set_sparsity(model, 0.0)
        >>> ltepass.measure_sparsity(model, batches)
        {'model.layers.0.mlp': 0.0, 'model.layers.1.mlp': 0.0}
    """
    return hard_sparsity(Routed.trained(model, "measure_sparsity"), batches)


def hard_sparsity(routed: Routed, batches: Iterable[Batch]) -> dict[str, float]:
    """Of `measure_sparsity`."""
    with counting_inactive(routed) as shares:
        run_batches(routed.model, batches)
    return shares()


@contextmanager
def counting_inactive(routed: Routed) -> Iterator[Callable[[], dict[str, float]]]:
    """Hard mode while the block runs; the function gives what `measure_sparsity` does, of the forwards in it."""
    active, odd = ({site.name: Tally() for site in routed.sites} for _ in range(2))

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        scores = token_masks.tokens_of(router, logits)
        active[site.name].add(scores > router.threshold)
        odd[site.name].add(~scores.isfinite())

    def shares() -> dict[str, float]:
        _require_finite(active, odd)
        return {name: 1.0 - tally.share() for name, tally in active.items()}

    with mode_of(routed, "hard"), on_logits(routed, see):
        yield shares


@verb
def measure_union(model: nn.Module, batches: Iterable[Batch], window: int = 2) -> dict[str, float]:
    """Share of experts that no token of a window uses: what a batched kernel can skip.

    Arguments:
        model: a transformed model, not lowered.
        batches: mappings of model inputs, or token id tensors. Every whole window of every row counts that has no
            padding.
        window: how many neighbouring tokens.
    Returns: the share in [0, 1], by site name.
    Raises: NotTransformedError, LoweredError, CalibrationError (no window of tokens seen, or scores not finite).
    Example:
        >>> one, four = (ltepass.measure_union(model, batches, window) for window in (1, 4))
        >>> all(four[name] <= one[name] for name in one)
        True
    """
    routed = Routed.trained(model, "measure_union")
    unused, odd = ({site.name: Tally() for site in routed.sites} for _ in range(2))

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        logits, real = token_masks.sequences_of(router, logits)
        if logits.shape[-2] >= window:
            nobody = (logits <= router.threshold).unfold(-2, window, 1).all(-1)
            unused[site.name].add(nobody[real.unfold(-1, window, 1).all(-1)])
            odd[site.name].add(~logits[real].isfinite())

    with mode_of(routed, "hard"), on_logits(routed, see):
        run_batches(routed.model, batches)
    _require_finite(unused, odd)
    return {name: tally.share() for name, tally in unused.items()}


def _require_finite(seen: dict[str, Tally], odd: dict[str, Tally]) -> None:
    """A NaN is above no threshold, and would count as inactive; in a proxy's scores it is +Inf."""
    require_seen({name: tally.count for name, tally in seen.items()})
    for name, tally in odd.items():
        if int(tally.true):
            raise not_finite(name)


@verb
@torch.no_grad()
def sparsity_of_tail(model: PreTrainedModel, ids: Tensor, skip: int) -> float:
    """Mean share of inactive neurons, over sites, for tokens skip.. of ids [T]; the model must be in hard mode.

    Raises NotTransformedError, LoweredError.
    """
    routed = Routed.trained(model, "sparsity_of_tail")
    with record_logits(routed) as seen:
        model(input_ids=ids[None].to(model.device), use_cache=False)
    shares = []
    for site, router in routed:
        (logits,) = seen[site.name]
        shares.append(1.0 - (logits[skip:] > router.threshold).float().mean().item())
    return sum(shares) / len(shares)


def sparsity_curve(
    model: PreTrainedModel, blocks: Tensor, sparsities: Iterable[float]
) -> Iterator[tuple[float, float, float]]:
    """(asked for, perplexity, measured sparsity) of one checkpoint in hard mode at other points of its table.

    blocks: [n, T] int64. The thresholds stand where they stood afterwards. Raises CalibrationError without a table,
    LoweredError.
    """
    routers = Routed.trained(model, "sparsity_curve").routers
    before = [r.threshold.clone() for r in routers]
    try:
        for sparsity in sparsities:
            set_sparsity(model, sparsity)
            shares = measure_sparsity(model, blocks[:, None].to(model.device))
            yield sparsity, perplexity(model, blocks), sum(shares.values()) / len(shares)
    finally:
        for router, threshold in zip(routers, before, strict=True):
            router.threshold.copy_(threshold)
