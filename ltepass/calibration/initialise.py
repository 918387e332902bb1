"""From a few batches of text: data-driven grouping, a router start, and the sparsity table.

The paper gives no router start. Ours predicts each expert's energy, the norm of h_j ||down_j|| over its neurons, from
the FFN's input by ridge regression, and puts the threshold where the target share of experts is inactive; with budget
"model" the loss's own metric stands for ||down_j|| (`sensitivity.py`). Part of a dense pass samples tokens to group
neurons by; another adds up what the regression needs, which is as small for a million tokens as for one.
What needs few tokens sees every eighth batch: which FFNs matter, and where thresholds lie.

What hard gates give the next FFN is not what the dense model gave it, and at a high sparsity the two have little in
common: with `inputs="hard"` thresholds are placed, routers fitted again and thresholds placed again on what the model
itself makes of the text. The layer-wise warm start mends the inputs by its own means, and wants routers that know the
dense model's. What each gives before any training stands in `examples/results/frontier.md`, as lte-calibrated and
lte-warm; what a start costs, in `examples/results/start_cost.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ltepass.calibration.energy import MAX_LOG_OFFSET, down_energy, expert_energy, log_energy
from ltepass.calibration.plane_codes import quantise_planes
from ltepass.calibration.proxy_scale import fresh_proxies, scale_proxies
from ltepass.calibration.ridge import RidgeSums
from ltepass.calibration.sensitivity import Sensitivity, sensitivities
from ltepass.config import Mode
from ltepass.errors import ConfigError, MetaWeightsError
from ltepass.grouping_methods import AUTO, AUTO_WITH_DATA
from ltepass.passes.group.group_neurons import permute_routed, site_permutation
from ltepass.routed.batches import every, on_every
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import Routed, require_whole
from ltepass.routed.router import Router
from ltepass.routed.samples import SAMPLE_TOKENS, Reservoir, collect
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import keep, verb
from ltepass.routed.watching import Observer, watch
from ltepass.sparsity.cuts import place_cuts
from ltepass.sparsity.thresholds import is_calibrated, move_biases, table_of, update_table

Inputs = Literal["dense", "hard"]
FIRST_FIT_STRIDE = 4  # every fourth batch, for a fit that only leads to the next
THRESHOLD_STRIDE = 8  # every eighth, for thresholds and costs
LOGIT_STD = 2.0  # spread of the starting logits: a quarter of the scores lie within 0.15 of tau, off the pole


@verb
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, grouping: str | None = None, inputs: Inputs = "dense"
) -> None:
    """Group neurons, start routers for the config's target and fill the sparsity table, without training.

    Arguments:
        model: a transformed model, not lowered.
        batches: mappings of model inputs (what a tokenizer or a data collator gives), or token id tensors; padding is
            not seen. A few thousand tokens are enough, and more make better routers (`examples/compare/ablations.py
            --only start` measures what they are worth).
        grouping: a method of `LTEConfig.grouping`; None takes the config's ("auto" is output_aware here). Groups that
            an earlier calibration made by this method stay, as do all for "identity".
        inputs: what routers are fitted to: "dense", what the dense model gives its FFNs, before any training or
            `warm_start`; "hard", what they see once experts are left out (under the present cuts, if any), for a model
            that is used as it is. It passes over the batches 1.6 times from eight batches of 512 tokens on, and up to
            five times with fewer, where "dense" does once. Learned routers are replaced by either. To quantise for
            `inactive="low_bit"` takes six passes more.
    Returns: None; mode, training flags, RNG and hooks are as they were.
    Raises: NotTransformedError, LoweredError, ShardedError, ConfigError, MetaWeightsError, CalibrationError (no tokens
        seen).
    Example:
        >>> model = ltepass.transform(dense)
        >>> ltepass.calibrate(model, batches)
        >>> ltepass.set_sparsity(model, 0.7)
    """
    routed = Routed.trained(model, "calibrate")
    require_whole(model, "calibrate")
    if inputs not in get_args(Inputs):
        raise ConfigError(f"inputs is {inputs!r}; expected one of {', '.join(get_args(Inputs))}; see calibrate's docs")
    if routed.config["budget"] == "model" and any(router.bias is None for router in routed.all_routers()):
        raise ConfigError('budget "model" puts what an FFN matters into its router\'s bias; expected router_bias=True')
    if any(p.is_meta for p in model.parameters()):
        raise MetaWeightsError("calibration needs real weights and the model is on the meta device; load them first")
    batches = list(batches)
    group_by(routed, batches, grouping)
    initialise_routers(routed, batches, inputs)
    place_cuts(routed, batches)


def group_by(routed: Routed, batches: Sequence[Any], grouping: str | None) -> None:
    """Reorder every site's neurons by the method, unless they are in its order already."""
    method = grouping or routed.config["grouping"]
    method = AUTO_WITH_DATA if method == AUTO else method
    if method == "identity" or all(site.group_size == 1 for site in routed.sites):  # no order makes groups of one
        return
    by_rows = method == "kmeans" and not is_calibrated(routed)  # transform had no inputs to group by
    if method != routed.state.grouping or by_rows:
        samples = collect(routed, batches)
        orders: dict[Any, Tensor] = {}  # sites that share their weights share their order
        for site in routed.sites:
            if site.neurons not in orders:
                sample, seed = samples[site.name], routed.config["seed"]
                orders[site.neurons] = site_permutation(routed.model, site, method, sample, seed)
                permute_routed(routed, site, orders[site.neurons])
    routed.state.grouping = method


def initialise_routers(routed: Routed, batches: Sequence[Any], inputs: Inputs) -> None:
    """Routers that predict log energy, times a scale, with their thresholds at the target; fills the table.

    Proxies hold what they predict, and only find their unit (`proxy_scale.py`).

    With budget "model" sites compete: they get one scale and one threshold, and a site's mean logit stands for its log
    cost in the dense model, whichever inputs it is fitted to. A site whose inputs shrink in hard mode would give up
    ever more experts.
    """
    target = routed.config["target_sparsity"]
    log_costs: dict[str, float] | None = None
    found: dict[str, Sensitivity] | None = None
    if routed.config["budget"] == "model":
        found = on_every(THRESHOLD_STRIDE, batches, partial(sensitivities, routed))
    if routed.config.get("router") == "proxy":
        fresh_proxies(routed, found)
        if routed.tiered and routed.config["low_bit_quantiser"] == "gptq":
            quantise_planes(routed, batches)
        on_every(THRESHOLD_STRIDE, batches, lambda some: scale_proxies(routed, some, found))
        move_biases(routed, target)
        for _ in range(2 if inputs == "hard" and target > 0 else 0):  # the second sees the inputs of moved thresholds
            _recalibrate(routed, every(THRESHOLD_STRIDE, batches), target)
        return
    if found is not None:
        weights = {name: s.neurons for name, s in found.items()}
        log_costs = {name: s.log_cost for name, s in found.items()}
    else:
        weights = {s.name: down_energy(routed.model, s) for s in routed.sites}
    adapts = inputs == "hard" and target > 0
    scales: dict[str, float] = {}
    passes: list[tuple[Mode, int, int]] = [("dense", 1, 0)]
    if adapts:  # thresholds of the last fit twice: the second sees the inputs that the moved thresholds make
        passes = [("dense", FIRST_FIT_STRIDE, 1), ("hard", 1, 2)]
    for mode, nth, meetings in passes:
        fits = on_every(nth, batches, partial(fit_energies, routed, weights=weights, mode=mode))
        scales = scales or _scales(fits, together=log_costs is not None)  # of the dense pass
        for name, fit in fits.items():
            offset = 0.0 if log_costs is None else max(log_costs[name] - fit.mean_log, -MAX_LOG_OFFSET)
            fits[name] = fit.scaled(scales[name], scales[name] * offset)
        _place(routed, fits, target)
        for _ in range(meetings):
            _recalibrate(routed, every(THRESHOLD_STRIDE, batches), target)


@dataclass
class _Fit:
    """Linear fit of the log energy of a site's experts, and its values on a sample of what it was fitted to.

    mean_log: of the energies that are not exactly 0.
    """

    weight: Tensor
    bias: Tensor
    logits: Tensor
    mean_log: float

    def scaled(self, scale: float, offset: float) -> _Fit:
        return _Fit(scale * self.weight, scale * self.bias + offset, scale * self.logits + offset, self.mean_log)


class _EnergyFit(Observer):
    """Regression of the log energy of one site's experts on its input; keeps SAMPLE_TOKENS inputs."""

    def __init__(self, site: FFNSite, router: Router, weights: Tensor) -> None:
        super().__init__(site, router)
        self.weights, self.kept, self.sums = weights, Reservoir(SAMPLE_TOKENS), RidgeSums()
        self.log_sum, self.count = (torch.zeros((), dtype=torch.float64, device=weights.device) for _ in range(2))

    def on_input(self, x: Tensor) -> None:
        self.x = x.float()
        self.kept.add(x.to(torch.bfloat16))

    def on_hidden(self, h: Tensor) -> None:
        energy = expert_energy(self.site, h, self.weights)
        logs = log_energy(energy)
        self.sums.add(self.x, logs)
        del self.x
        self.log_sum += logs.where(energy > 0, 0.0).sum(dtype=torch.float64)  # in fp32 its bits follow the threads
        self.count += (energy > 0).sum()

    def fit(self) -> _Fit:
        weight, bias = self.sums.solve()
        logits = self.kept.rows().float() @ weight.T + bias
        return _Fit(weight, bias, logits, float(self.log_sum / self.count.clamp_min(1)))


def fit_energies(routed: Routed, batches: Sequence[Any], weights: dict[str, Tensor], mode: Mode) -> dict[str, _Fit]:
    """By site name: fitted on every token of the batches, as the FFNs see it in this mode."""
    observers = [_EnergyFit(site, router, weights[site.name]) for site, router in routed]
    watch(routed, batches, observers, mode=mode)
    return {o.site.name: o.fit() for o in observers}


def _scales(fits: dict[str, _Fit], *, together: bool) -> dict[str, float]:
    """By site: what brings the logits to a spread of LOGIT_STD, each site's own or on average."""
    spreads = {name: max(float(fit.logits.std()), 1e-6) for name, fit in fits.items()}
    if together:
        spreads = dict.fromkeys(spreads, sum(spreads.values()) / len(spreads))
    return {name: LOGIT_STD / spread for name, spread in spreads.items()}


def _place(routed: Routed, fits: dict[str, _Fit], target: float) -> None:
    """Weights, tables and thresholds, which stay logit(tau) where a bias can carry the target, as in the paper."""
    for site, router in routed:
        fit = fits[site.name]
        keep(router.weight, router.bias)
        with torch.no_grad():
            router.weight.copy_(fit.weight)
            if router.bias is not None:
                router.bias.copy_(fit.bias)
            router.quantiles.copy_(table_of(fit.logits if router.bias is not None else fit.logits - fit.bias))
    move_biases(routed, target)


def _recalibrate(routed: Routed, batches: Sequence[Any], target: float) -> None:
    """Tables, and thresholds at the target, on the inputs that hard gates give the FFNs."""
    with mode_of(routed, "hard"):
        update_table(routed, batches)
    move_biases(routed, target)
