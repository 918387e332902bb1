"""Routers at the target before any training, and the sparsity table.

The paper gives no router start. Ours predicts each expert's energy, the norm of h_j ||down_j|| over its neurons, from
the FFN's input by ridge regression, and puts the threshold where the target share of experts is inactive; with budget
"model" the loss's own metric stands for ||down_j|| (`sensitivity.py`). A dense pass adds up what the
regression needs, which is as small for a million tokens as for one.
What needs few tokens sees every eighth batch: which FFNs matter, and where thresholds lie.

What hard gates give the next FFN is not what the dense model gave it, and at a high sparsity the two have little in
common: with `inputs="hard"` thresholds are placed, routers fitted again and thresholds placed again on what the model
itself makes of the text. The layer-wise warm start mends the inputs by its own means, and wants routers that know the
dense model's. What each gives before any training stands in `examples/results/frontier.md`, as lte-calibrated and
lte-warm; what a start costs, in `examples/results/start_cost.md`.

Of proxies nothing is regressed, since they hold what they are to predict. Their codes are made of the weights as they
are, and one dense pass says in which unit a site's scores are logits: their quartiles are LOGIT_IQR apart, so that a
sigmoid is neither flat nor a step. With budget "model" the loss's own metric stands for |down_j|: a site's scores mean
what leaving an expert out costs, and all have one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ltepass.calibration.energy import MAX_LOG_OFFSET, EnergyFit, down_energy, fit_energies
from ltepass.calibration.gptq import quantise_planes
from ltepass.calibration.sensitivity import Sensitivity, sensitivities
from ltepass.config import Mode
from ltepass.errors import ShardedError
from ltepass.routed.batches import Batch, every, on_every
from ltepass.routed.modes import mode_of
from ltepass.routed.observers import Observer, require_finite, watch
from ltepass.routed.offloaded import fetched
from ltepass.routed.proxy_router import ProxyRouter, encode
from ltepass.routed.quantile_table import quantiles, table_of, table_tokens
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import Reservoir
from ltepass.routed.sites import FFNSite
from ltepass.routed.tiered_router import TieredRouter, encode_planes
from ltepass.routed.undo import keep
from ltepass.sparsity.thresholds import move_biases, update_table

Inputs = Literal["dense", "hard"]
FIRST_FIT_STRIDE = 4  # every fourth batch, for a fit that only leads to the next
THRESHOLD_STRIDE = 8  # every eighth, for thresholds and costs
LOGIT_STD = 2.0  # spread of the starting logits: a quarter of the scores lie within 0.15 of tau, off the pole


def initialise_routers(routed: Routed, batches: Sequence[Any], inputs: Inputs) -> None:
    """Routers that predict log energy, times a scale, with their thresholds at the target; fills the table.

    Proxies hold what they predict, and only find their unit.

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


def _scales(fits: dict[str, EnergyFit], *, together: bool) -> dict[str, float]:
    """By site: what brings starting logits to a spread of LOGIT_STD, each site's own or on average."""
    spreads = {name: max(float(fit.logits.std()), 1e-6) for name, fit in fits.items()}
    if together:
        spreads = dict.fromkeys(spreads, sum(spreads.values()) / len(spreads))
    return {name: LOGIT_STD / spread for name, spread in spreads.items()}


def _place(routed: Routed, fits: dict[str, EnergyFit], target: float) -> None:
    """Start the routers with these: weights, tables and thresholds, which stay logit(tau) where a bias can carry the
    target, as in the paper.
    """
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


LOGIT_IQR = 2.7  # between the quartiles of the starting logits: what a normal distribution of deviation 2 has


class _Scores(Observer):
    """A sample of one site's scores in a dense pass."""

    def __init__(self, site: FFNSite, router: Router) -> None:
        super().__init__(site, router)
        self.kept = Reservoir(table_tokens(site.n_experts))

    def on_input(self, x: Tensor) -> None:
        self.kept.add(self.router.logits(x.float()))


def fresh_proxies(routed: Routed, found: dict[str, Sensitivity] | None) -> None:
    """Proxies as they were made, of what the weights are now; scores are in the FFN's own unit. found: of budget
    "model".
    """
    for site, router in routed:
        assert isinstance(router, ProxyRouter)
        with fetched(routed.model, site):
            done = encode(routed.model, site, router)
            if isinstance(router, TieredRouter):
                done = done and encode_planes(routed.model, site, router)
        if not done:
            raise ShardedError(
                f"{site.name}: its weights are no whole parameters of the model any more (an adapter or a shard holds "
                "them), and a proxy is made of them; call ltepass.calibrate(model, batches) before wrapping"
            )
        keep(router.weight, router.bias)
        with torch.no_grad():
            router.weight.fill_(1.0)
            router.bias.zero_()
        neurons = down_energy(routed.model, site) if found is None else found[site.name].neurons
        router.sizes.copy_(neurons.sqrt())


def scale_proxies(routed: Routed, batches: Sequence[Batch], found: dict[str, Sensitivity] | None) -> None:
    """Sizes and tables of fresh ones; thresholds stay for the caller."""
    observers = [_Scores(site, router) for site, router in routed]
    watch(routed, batches, observers)
    samples = {o.site.name: o.kept.rows() for o in observers}
    for name, scores in samples.items():
        require_finite(name, scores)
    factors = dict.fromkeys(samples, 1.0)
    if found is not None:
        factors = {name: _factor(found[name].log_cost, scores) for name, scores in samples.items()}
    spreads = {name: factors[name] * _spread(scores) for name, scores in samples.items()}
    if found is not None:
        spreads = dict.fromkeys(spreads, math.exp(sum(map(math.log, spreads.values())) / len(spreads)))
    for site, router in routed:
        scale = factors[site.name] * LOGIT_IQR / spreads[site.name]
        router.sizes.mul_(scale)  # type: ignore[operator]
        router.quantiles.copy_(table_of(samples[site.name]) * scale)


def _spread(scores: Tensor) -> float:
    """Between the quartiles; of experts that are mostly 0, as a ReLU leaves them, the mean; 1 where all are."""
    low, high = quantiles(scores.flatten(), scores.new_tensor([0.25, 0.75])).tolist()
    usual = high - low or float(scores.mean())
    return usual if math.isfinite(usual) and usual > 0 else 1.0


def _factor(log_cost: float, scores: Tensor) -> float:
    """What makes the mean of log score^2, of the scores that are not 0, the site's log cost."""
    logs = 2 * scores[scores > 0].double().log()
    offset = log_cost - float(logs.mean()) if logs.numel() else 0.0
    return math.exp(min(max(offset, -MAX_LOG_OFFSET), MAX_LOG_OFFSET) / 2)
