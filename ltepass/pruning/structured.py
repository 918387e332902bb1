"""Structured: experts that no token uses are taken out of their FFNs, with their rows in the routers.

    before:  h: [..., d_ff];   s = router(x): [..., n_experts];  y = down(gate(h, s))
    after:   h: [..., d_ff'];  s: [..., n_experts'];             y the same wherever no expert that went was active

Routers stay for the experts that are left, so that hard mode computes what it did; `ltepass.remove` then gives a dense
model of the smaller FFNs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ltepass import transformers_hook
from ltepass.config import LTEConfig
from ltepass.errors import CalibrationError, PruningError, first_line
from ltepass.passes.insert.insert_routers import insert_routers
from ltepass.passes.insert.remove_routers import remove_routers
from ltepass.passes.insert.try_gated_copy import check_gated
from ltepass.pruning.width_in_config import say_width
from ltepass.routed.batches import Batch, run_batches
from ltepass.routed.modes import mode_of, remember_densities
from ltepass.routed.narrowing import Neurons, narrow
from ltepass.routed.observers import not_finite, on_logits, require_seen
from ltepass.routed.routed import Routed, require_whole, set_state
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, LTEState, read_rows
from ltepass.routed.token_masks import tokens_of
from ltepass.sparsity.thresholds import is_calibrated, update_table


def remove_experts(model: nn.Module, batches: Sequence[Batch], *, sparsity: float | None, equal_widths: bool) -> None:
    """Of `ltepass.prune`, with method "inactive"."""
    routed = Routed.trained(model, "prune")
    _check(routed, batches)
    kept = experts_kept(routed.sites, uses(routed, batches), sparsity, equal_widths)
    if all(len(kept[site.neurons]) == site.n_experts for site in routed.sites):
        warnings.warn(
            "every expert is used by some token of the batches, and nothing was pruned; give a sparsity to leave out "
            "those that are used least, or train to a higher one first",
            stacklevel=4,
        )
        return
    modes = [(router.mode, router.weight.requires_grad) for router in routed.routers]
    routed = _without_others(routed, kept, equal_widths=equal_widths)
    for router, (mode, learns) in zip(routed.routers, modes, strict=True):
        router.mode = mode
        router.requires_grad_(learns)
    _measure(routed, batches)


def _check(routed: Routed, batches: Sequence[Batch]) -> None:
    """All that can be refused before anything changes."""
    require_whole(routed.model, "prune")
    routed.require_gates("prune")
    if not batches:
        raise CalibrationError("no batches were given; prune expects some that show which experts are used; pass them")
    for site, router in routed:
        if routed.model.get_submodule(site.router) is not router or any(
            read_rows(routed.model, site, rows) is None for rows in site.neurons
        ):
            raise PruningError(
                f"{site.name}: an adapter, a mask or a quantised weight stands in the place of a linear's own, or of "
                "the router; prune expects plain ones; merge adapters or make masks permanent first"
            )


def uses(routed: Routed, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By site [n_experts] int64: tokens at which each expert is active in hard mode, padding not counted."""
    counts = {site.name: torch.zeros(site.n_experts, dtype=torch.int64) for site in routed.sites}
    tokens = dict.fromkeys(counts, 0)

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        scores = tokens_of(router, logits)
        if not bool(scores.isfinite().all()):
            raise not_finite(site.name)
        counts[site.name] += (scores > router.threshold).sum(0).cpu()
        tokens[site.name] += len(scores)

    with mode_of(routed, "hard"), on_logits(routed, see):
        run_batches(routed.model, batches)
    require_seen(tokens)
    return counts


def experts_kept(
    sites: Sequence[FFNSite], used: Mapping[str, Tensor], sparsity: float | None, equal_widths: bool
) -> dict[Neurons, Tensor]:
    """By what sites share: the experts that stay, int64, ascending; one at least, those used most.

    sparsity: share of each FFN's experts that go; None: those that no token used. Raises PruningError.
    """
    together = {site.neurons: [s for s in sites if s.neurons == site.neurons] for site in sites}
    totals = {neurons: sum(used[s.name] for s in same) for neurons, same in together.items()}
    numbers = {}
    for neurons, total in totals.items():
        assert isinstance(total, Tensor)
        left = int((total > 0).sum()) if sparsity is None else round((1.0 - sparsity) * len(total))
        numbers[neurons] = max(1, left)
    if equal_widths:
        sizes = {neurons: same[0].group_size for neurons, same in together.items()}
        width = max(numbers[neurons] * sizes[neurons] for neurons in numbers)
        fits = {same[0]: not width % same[0].group_size and width <= same[0].d_ff for same in together.values()}
        wrong = next((site for site, fit in fits.items() if not fit), None)
        if wrong is not None:
            raise PruningError(
                f"equal_widths: {width} neurons are left in the widest FFN, and {wrong.name} has {wrong.d_ff} in "
                f"groups of {wrong.group_size}; expected FFNs of one size; leave equal_widths out"
            )
        numbers = {neurons: width // sizes[neurons] for neurons in numbers}
    return {n: _most(total, numbers[n]) for n, total in totals.items() if isinstance(total, Tensor)}


def _most(total: Tensor, number: int) -> Tensor:
    """The experts used most; of those used alike the first."""
    return total.argsort(descending=True, stable=True)[:number].sort().values


def _without_others(routed: Routed, kept: Mapping[Neurons, Tensor], *, equal_widths: bool) -> Routed:
    """The model anew, as loading makes it: a dense one with fewer neurons, routers in it, and their tensors."""
    model, state = routed.model, routed.state
    tensors = [router.of_experts(kept[site.neurons]) for site, router in routed]
    neurons = {site.neurons: router.neurons_of(kept[site.neurons]) for site, router in routed}
    remove_routers(routed, undo_grouping=False)
    transformers_hook.detach(model)
    sites = narrow(model, state.sites, neurons)
    said = _say_width(model, sites, required=equal_widths)
    insert_routers(model, sites, LTEConfig(**state.config))
    now = LTEState(state.config, sites, state.refusals, grouping=state.grouping, narrowed=not said)
    set_state(model, now)
    smaller = Routed(model, now)
    for router, own in zip(smaller.routers, tensors, strict=True):
        router.load_state_dict(own)
    now.untried = check_gated(model, sites)
    transformers_hook.attach(model)
    return smaller


def _say_width(model: nn.Module, sites: Sequence[FFNSite], *, required: bool) -> bool:
    """Whether the class builds such FFNs by itself: what its config says, or for a module without one, not known."""
    widths = {site.d_ff for site in sites}
    if len(widths) == 1 and say_width(model, *widths):
        return True
    if required and hasattr(model, "save_pretrained"):
        raise PruningError(
            f"equal_widths: no entry of {type(model.config).__name__} makes FFNs of {max(widths)} neurons; expected "
            "one such as intermediate_size; leave equal_widths out, and load what is saved where ltepass is installed"
        )
    return False


def _measure(routed: Routed, batches: Sequence[Batch]) -> None:
    """A table of the experts that are left; the thresholds stay. A model that does not run is refused."""
    try:
        if is_calibrated(routed):
            update_table(routed, batches)
        else:
            run_batches(routed.model, batches[:1])
    except RuntimeError as error:
        raise PruningError(
            f"the model does not run with fewer neurons ({first_line(error)}); expected a forward that takes its sizes "
            "from its weights; prune weights instead (method 'magnitude'), or leave those FFNs out of transform"
        ) from error
    remember_densities(routed)
