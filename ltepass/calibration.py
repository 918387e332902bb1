"""From a few batches of text: data-driven grouping, a router start, and the sparsity table.

The paper gives no router start. Ours predicts each expert's energy, the norm of h_j ||down_j|| over its neurons, from
the FFN's input by ridge regression, and puts the threshold where the target share of experts is inactive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError, LoweredError, MetaWeightsError
from ltepass.grouping import ActivationStats, grouping_permutation, permute_site
from ltepass.router import N_QUANTILES, Router
from ltepass.sensitivity import loss_sensitivity
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import interpolate, mode_of, quantiles, run_batches, shared_table

BUDGET_BYTES = 900_000_000  # of sampled activations, all sites together
RIDGE = 1e-2  # relative to the mean variance of x; the fit is flat between 1e-3 and 1e-1
LOGIT_STD = 2.0  # spread of the starting logits: a quarter of the scores lie within 0.15 of tau, off the pole


@dataclass
class Sample:
    """What one site saw: x [n_tokens, d_model] and hidden units h [n_tokens, d_ff], both fp32 when read."""

    x: Tensor
    h: Tensor


def calibrate(model: nn.Module, batches: Iterable[Any], *, grouping: str | None = None) -> None:
    """Group neurons, start routers and fill the sparsity table from one dense pass over `batches`.

    batches: dicts of model inputs, or token id tensors; a few thousand tokens are enough.
    grouping: a method of `ltepass.grouping`; None takes the config's ("auto" is coactivation here).
    Leaves mode, training flags, RNG and hooks as they were. Raises NotTransformedError, LoweredError,
    MetaWeightsError, CalibrationError (no tokens seen).
    """
    state = require_state(model, "calibrate")
    if state.lowered is not None:
        raise LoweredError("calibrate expects the model as trained; call ltepass.unlower(model)")
    if state.config["budget"] == "model":
        batches = list(batches)
    samples = collect(model, batches)
    start_from(model, samples, batches, grouping=grouping)


def collect(model: nn.Module, batches: Iterable[Any]) -> dict[str, Sample]:
    """Sampled inputs and hidden units of every site, in dense mode, bounded by BUDGET_BYTES."""
    state = require_state(model, "collect")
    if any(p.is_meta for p in model.parameters()):
        raise MetaWeightsError("calibration needs real weights and the model is on the meta device; load them first")
    per_token = sum(2 * (s.d_model + s.d_ff) for s in state.sites)
    room = max(256, BUDGET_BYTES // per_token)
    collectors = [_Collector(s, router_of(model, s), room) for s in state.sites]
    try:
        with mode_of(model, "dense"):
            run_batches(model, batches)
    finally:
        for c in collectors:
            c.close()
    empty = [c.site.name for c in collectors if not c.x]
    if empty:
        raise CalibrationError(
            f"calibration saw no token at {empty[0]} ({len(empty)} of {len(collectors)} sites); expected at least one "
            "batch that runs through every FFN; pass batches of token ids"
        )
    return {c.site.name: Sample(torch.cat(c.x), torch.cat(c.h)) for c in collectors}


class _Collector:
    """Keeps bfloat16 copies of what one site sees, up to `room` tokens."""

    def __init__(self, site: FFNSite, router: Router, room: int) -> None:
        self.site, self.router, self.room = site, router, room
        self.x: list[Tensor] = []
        self.h: list[Tensor] = []
        self.handle = router.register_forward_pre_hook(lambda _, args: self._keep(self.x, args[0]))
        router.observer = lambda h: self._keep(self.h, h)

    def _keep(self, rows: list[Tensor], value: Tensor) -> None:
        left = self.room - sum(len(r) for r in rows)
        if left > 0:
            rows.append(value.detach().reshape(-1, value.shape[-1])[:left].to(torch.bfloat16, copy=True))

    def close(self) -> None:
        self.handle.remove()
        self.router.observer = None


def start_from(
    model: nn.Module, samples: dict[str, Sample], batches: Iterable[Any] = (), *, grouping: str | None = None
) -> None:
    """Grouping, router start and table from collected samples, which are reordered with the neurons.

    batches: what the samples came from; only the budget "model" runs the model on them again.
    """
    state = require_state(model, "calibrate")
    method = grouping or state.config["grouping"]
    method = "coactivation" if method == "auto" else method
    orders: dict[Any, Tensor] = {}  # sites that share their weights share their order
    for site in state.sites:
        sample = samples[site.name]
        if method != state.grouping and method != "identity":
            if site.neurons not in orders:
                orders[site.neurons] = site_permutation(model, site, method, sample, state.config["seed"])
                permute_site(model, site, orders[site.neurons])
            sample.h = sample.h[:, orders[site.neurons]]
    state.grouping = method
    if state.config["budget"] == "model":
        start_together(model, samples, loss_sensitivity(model, batches), state.config["target_sparsity"])
    else:
        for site in state.sites:
            start_router(model, site, samples[site.name], state.config["target_sparsity"])


def site_permutation(model: nn.Module, site: FFNSite, method: str, sample: Sample | None, seed: int) -> Tensor:
    """A method's permutation of one site; sample may be None for methods that need no data."""
    up, down = (rows.of(model, site.d_ff).detach() for rows in (site.up_rows, site.down_rows))
    gate = site.gate_rows.of(model, site.d_ff).detach() if site.gate_rows else None
    stats = None if sample is None else ActivationStats(sample.h[:2048].float())
    return grouping_permutation(
        method, up=up, gate=gate, down=down, activations=stats, group_size=site.group_size, seed=seed
    )


@dataclass
class _Fit:
    """Linear fit of the log energy of a site's experts, and its values on the sample."""

    weight: Tensor
    bias: Tensor
    logits: Tensor

    def scaled(self, scale: float, offset: float = 0.0) -> _Fit:
        return _Fit(scale * self.weight, scale * self.bias + offset, scale * self.logits + offset)


def fit_energy(model: nn.Module, site: FFNSite, sample: Sample) -> _Fit:
    x = sample.x.float()
    weight, bias = ridge(x, expert_energy(model, site, sample.h).clamp_min(1e-12).log())
    return _Fit(weight, bias, x @ weight.T + bias)


def start_router(model: nn.Module, site: FFNSite, sample: Sample, target_sparsity: float) -> None:
    """Fit one router to its experts' energies and place its threshold; fills the table."""
    router, fit = router_of(model, site), fit_energy(model, site, sample)
    fit = fit.scaled(LOGIT_STD / float(fit.logits.std().clamp_min(1e-6)))
    grid = torch.linspace(0.0, 1.0, N_QUANTILES, device=fit.logits.device)
    if router.bias is not None:
        _place(router, fit, quantiles(fit.logits.flatten(), grid), target_sparsity)
        return
    with torch.no_grad():
        router.weight.copy_(fit.weight)
        router.quantiles.copy_(quantiles((fit.logits - fit.bias).flatten(), grid))
        router.threshold.copy_(interpolate(router.quantiles, target_sparsity))


def start_together(
    model: nn.Module, samples: dict[str, Sample], sensitivity: dict[str, float], target_sparsity: float
) -> None:
    """Fit all routers to what the loss would miss, log(energy * sensitivity): one scale, one threshold, one table."""
    sites = require_state(model, "calibrate").sites
    fits = [fit_energy(model, site, samples[site.name]) for site in sites]
    spread = sum(float(fit.logits.std()) for fit in fits) / len(fits)
    scale = LOGIT_STD / max(spread, 1e-6)
    offsets = [scale * math.log(max(sensitivity[site.name], 1e-30)) for site in sites]
    fits = [fit.scaled(scale, offset) for fit, offset in zip(fits, offsets, strict=True)]
    table = shared_table([fit.logits.flatten() for fit in fits])
    for site, fit in zip(sites, fits, strict=True):
        _place(router_of(model, site), fit, table.to(fit.logits.device), target_sparsity)


def _place(router: Router, fit: _Fit, table: Tensor, target_sparsity: float) -> None:
    """The threshold stays logit(tau), as in the paper: the bias carries the target."""
    assert router.bias is not None
    cut = interpolate(table, target_sparsity) if target_sparsity > 0 else table[0] - LOGIT_STD
    shift = logit_of(router) - cut
    with torch.no_grad():
        router.weight.copy_(fit.weight)
        router.bias.copy_(fit.bias + shift)
        router.quantiles.copy_(table + shift)
        router.threshold.fill_(logit_of(router))


def logit_of(router: Router) -> float:
    return math.log(router.tau / (1.0 - router.tau))


def expert_energy(model: nn.Module, site: FFNSite, h: Tensor) -> Tensor:
    """[n_tokens, n_experts]: sum over an expert's neurons of (h_j ||down_j||)^2."""
    down = site.down_rows.of(model, site.d_ff).detach().float()
    weighted = h.float().square() * down.square().sum(1)
    return weighted.view(*weighted.shape[:-1], site.n_experts, -1).sum(-1)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares y = x W^T + b with a small penalty on W: x [n, d], y [n, k] -> W [k, d], b [k]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean)).T
    return weight, y_mean - weight @ x_mean
