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
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import interpolate, mode_of, quantiles, run_batches

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
    samples = collect(model, batches)
    start_from(model, samples, grouping=grouping)


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


def start_from(model: nn.Module, samples: dict[str, Sample], *, grouping: str | None = None) -> None:
    """Grouping, router start and table from collected samples, which are reordered with the neurons."""
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
        start_router(model, site, sample, state.config["target_sparsity"])
    state.grouping = method


def site_permutation(model: nn.Module, site: FFNSite, method: str, sample: Sample | None, seed: int) -> Tensor:
    """A method's permutation of one site; sample may be None for methods that need no data."""
    up, down = (rows.of(model, site.d_ff).detach() for rows in (site.up_rows, site.down_rows))
    gate = site.gate_rows.of(model, site.d_ff).detach() if site.gate_rows else None
    stats = None if sample is None else ActivationStats(sample.h[:2048].float())
    return grouping_permutation(
        method, up=up, gate=gate, down=down, activations=stats, group_size=site.group_size, seed=seed
    )


def start_router(model: nn.Module, site: FFNSite, sample: Sample, target_sparsity: float) -> None:
    """Fit one router to its experts' energies and place its threshold; fills the table."""
    router, x = router_of(model, site), sample.x.float()
    energy = expert_energy(model, site, sample.h)
    weight, bias = ridge(x, energy.clamp_min(1e-12).log())
    logits = x @ weight.T + bias
    scale = LOGIT_STD / float(logits.std().clamp_min(1e-6))
    grid = torch.linspace(0.0, 1.0, N_QUANTILES, device=x.device)
    table = quantiles((scale * logits).flatten(), grid)
    # the threshold stays logit(tau), as in the paper: the bias carries the target
    cut = interpolate(table, target_sparsity) if target_sparsity > 0 else table[0] - LOGIT_STD
    shift = logit_of(router) - cut
    with torch.no_grad():
        router.weight.copy_(scale * weight)
        if router.bias is not None:
            router.bias.copy_(scale * bias + shift)
            router.quantiles.copy_(table + shift)
            router.threshold.fill_(logit_of(router))
        else:
            router.quantiles.copy_(quantiles((scale * (x @ weight.T)).flatten(), grid))
            router.threshold.copy_(interpolate(router.quantiles, target_sparsity))


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
