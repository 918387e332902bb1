"""From a few batches of text: data-driven grouping, a router start, and the sparsity table.

The paper gives no router start. Ours predicts each expert's energy, the norm of h_j ||down_j|| over its neurons, from
the FFN's input by ridge regression, and puts the threshold where the target share of experts is inactive; with budget
"model" the loss's own metric stands for ||down_j|| (`ltepass/sensitivity.py`). Two passes of
the dense model: the first samples tokens to group neurons by, the second adds up what the regression needs, which is as
small for a million tokens as for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.cuts import place_cuts
from ltepass.energy import down_energy, expert_energy, log_energy
from ltepass.errors import LoweredError
from ltepass.grouping import permute_site, site_permutation
from ltepass.observing import Observer, Sample, collect, watch
from ltepass.ridge import RidgeSums
from ltepass.router import Router
from ltepass.sensitivity import loss_sensitivity
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import interpolate, is_calibrated, place_threshold, shared_cut, table_of

LOG_LEAST = 70.0  # of an offset: an FFN that the output does not hear has none
LOGIT_STD = 2.0  # spread of the starting logits: a quarter of the scores lie within 0.15 of tau, off the pole


def calibrate(model: nn.Module, batches: Iterable[Any], *, grouping: str | None = None) -> None:
    """Group neurons, start routers and fill the sparsity table from two dense passes over `batches`.

    batches: dicts of model inputs, or token id tensors; a few thousand tokens are enough, and more make better routers
        (`examples/compare/ablations.py --only start` measures what they are worth).
    grouping: a method of `ltepass.grouping`; None takes the config's ("auto" is output_aware here). Groups that an
        earlier calibration made by this method stay, as do all for "identity".
    Leaves mode, training flags, RNG and hooks as they were. Raises NotTransformedError, LoweredError,
    MetaWeightsError, CalibrationError (no tokens seen).
    """
    state = require_state(model, "calibrate")
    if state.lowered is not None:
        raise LoweredError("calibrate expects the model as trained; call ltepass.unlower(model)")
    batches = list(batches)
    start_from(model, collect(model, batches), batches, grouping=grouping)
    place_cuts(model, batches)


class _EnergyFit(Observer):
    """Regression of the log energy of one site's experts on its input."""

    def __init__(self, site: FFNSite, router: Router, weights: Tensor) -> None:
        super().__init__(site, router)
        self.weights, self.sums = weights, RidgeSums()

    def on_input(self, x: Tensor) -> None:
        self.x = x.float()

    def on_hidden(self, h: Tensor) -> None:
        self.sums.add(self.x, log_energy(self.site, h, self.weights))


def start_from(
    model: nn.Module, samples: dict[str, Sample], batches: Sequence[Any], *, grouping: str | None = None
) -> None:
    """Grouping and table from collected samples, which are reordered with the neurons; routers from all `batches`."""
    state = require_state(model, "calibrate")
    method = grouping or state.config["grouping"]
    method = "output_aware" if method == "auto" else method
    by_rows = method == "kmeans" and not is_calibrated(model)  # transform had no inputs to group by
    regroup = method != "identity" and (method != state.grouping or by_rows)
    orders: dict[Any, Tensor] = {}  # sites that share their weights share their order
    for site in state.sites:
        sample = samples[site.name]
        if regroup:
            if site.neurons not in orders:
                orders[site.neurons] = site_permutation(model, site, method, sample, state.config["seed"])
                permute_site(model, site, orders[site.neurons])
            sample.h = sample.h[:, orders[site.neurons]]
    if method != "identity":
        state.grouping = method
    target = state.config["target_sparsity"]
    if state.config["budget"] == "model":
        found = loss_sensitivity(model, batches)
        weights = {name: s.neurons for name, s in found.items()}
        fits = fit_energies(model, samples, batches, weights)
        offsets = {
            s.name: found[s.name].log_cost - _mean_log(s, samples[s.name].h, weights[s.name]) for s in state.sites
        }
        start_together(model, fits, offsets, target)
        return
    fits = fit_energies(model, samples, batches, {s.name: down_energy(model, s) for s in state.sites})
    for site in state.sites:
        start_router(router_of(model, site), fits[site.name], target)


def _mean_log(site: FFNSite, h: Tensor, weights: Tensor) -> float:
    """Of the experts' energies that are not exactly 0."""
    energy = expert_energy(site, h, weights)
    return float(energy[energy > 0].log().mean().nan_to_num())


@dataclass
class _Fit:
    """Linear fit of the log energy of a site's experts, and its values on the sample."""

    weight: Tensor
    bias: Tensor
    logits: Tensor

    def scaled(self, scale: float, offset: float = 0.0) -> _Fit:
        return _Fit(scale * self.weight, scale * self.bias + offset, scale * self.logits + offset)

    def table(self) -> Tensor:
        return table_of(self.logits)


def fit_energies(
    model: nn.Module, samples: dict[str, Sample], batches: Iterable[Any], weights: dict[str, Tensor]
) -> dict[str, _Fit]:
    """By site name: fitted on every token of the batches, with its values on the sample. weights: of the neurons."""
    sites = require_state(model, "calibrate").sites
    observers = [_EnergyFit(s, router_of(model, s), weights[s.name]) for s in sites]
    watch(model, batches, observers)
    fits = {}
    for o in observers:
        weight, bias = o.sums.solve()
        fits[o.site.name] = _Fit(weight, bias, samples[o.site.name].x.float() @ weight.T + bias)
    return fits


def start_router(router: Router, fit: _Fit, target_sparsity: float) -> None:
    """One router from the fit of its experts' energies, with its threshold; fills the table."""
    fit = fit.scaled(LOGIT_STD / float(fit.logits.std().clamp_min(1e-6)))
    if router.bias is not None:
        _place(router, fit, _cut([fit.table()], target_sparsity))
        return
    with torch.no_grad():
        router.weight.copy_(fit.weight)
        router.quantiles.copy_(table_of(fit.logits - fit.bias))
        router.threshold.copy_(interpolate(router.quantiles, target_sparsity))


def start_together(model: nn.Module, fits: dict[str, _Fit], offsets: dict[str, float], target_sparsity: float) -> None:
    """All routers from what the loss would miss, log energy + the site's offset: one scale and one threshold."""
    spread = sum(float(fit.logits.std()) for fit in fits.values()) / len(fits)
    scale = LOGIT_STD / max(spread, 1e-6)
    fits = {name: fit.scaled(scale, scale * max(offsets[name], -LOG_LEAST)) for name, fit in fits.items()}
    cut = _cut([fit.table() for fit in fits.values()], target_sparsity)
    for site in require_state(model, "calibrate").sites:
        _place(router_of(model, site), fits[site.name], cut)


def _cut(tables: Sequence[Tensor], target_sparsity: float) -> Tensor:
    """Where the sites of these tables have their threshold together; below them all for a target of 0."""
    if target_sparsity > 0:
        return shared_cut(tables, target_sparsity)
    return torch.stack([table[0].to(tables[0].device) for table in tables]).min() - LOGIT_STD


def _place(router: Router, fit: _Fit, cut: Tensor) -> None:
    """The threshold stays logit(tau), as in the paper: the bias carries the target."""
    assert router.bias is not None
    table = fit.table()
    with torch.no_grad():
        router.weight.copy_(fit.weight)
        router.bias.copy_(fit.bias)
    place_threshold(router, table, cut.to(table.device))
