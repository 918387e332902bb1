"""Thresholds: the inference-time sparsity knob, and the tables of logits that it reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ltepass.config import check_sparsity
from ltepass.errors import CalibrationError
from ltepass.routed import token_masks
from ltepass.routed.batches import Batch, run_batches
from ltepass.routed.modes import mode_of, remember_densities
from ltepass.routed.observers import on_logits, require_finite
from ltepass.routed.quantile_table import interpolate, quantiles, table_of, table_tokens
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router, logit
from ltepass.routed.samples import Reservoir
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import keep, verb

BIAS_MARGIN = 2.0  # below the least calibration logit, for a bias that leaves every expert active
SHARED_POINTS = 4096  # values that stand for one site's logits where sites share a threshold


@verb
def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Move every router's threshold to the value that left this share of its calibration experts inactive.

    With the budget "model" all get the one value that leaves this share of all sites' experts inactive. Changes tensors
    in place: works on a lowered model and causes no recompile.

    Arguments:
        model: a calibrated model.
        sparsity: share of inactive experts, in [0, 1).
    Returns: None.
    Raises: ConfigError outside [0, 1), CalibrationError without a calibrated table, NotTransformedError.
    Example:
        >>> ltepass.set_sparsity(model, 0.7)
        >>> shares = ltepass.measure_sparsity(model, batches)
        >>> all(0.5 < share < 0.9 for share in shares.values())
        True
    """
    check_sparsity(sparsity, "sparsity")
    place_thresholds(Routed.of(model, "set_sparsity"), sparsity)


def place_thresholds(routed: Routed, sparsity: float) -> None:
    """Thresholds where the tables have this sparsity. Raises CalibrationError where a router has none."""
    if not is_calibrated(routed):
        raise CalibrationError(
            "the model has no calibrated sparsity table; set_sparsity expects one; call "
            "ltepass.calibrate(model, batches)"
        )
    for router, threshold in zip(routed.routers, thresholds_at(routed, sparsity), strict=True):
        router.threshold.copy_(threshold)
    remember_densities(routed)


def is_calibrated(routed: Routed) -> bool:
    """Whether every site's router has its table."""
    return not any(bool(router.quantiles.isnan().any()) for router in routed.routers)


def thresholds_at(routed: Routed, sparsity: float) -> list[Tensor]:
    """By site: the logit that `sparsity` puts the threshold at, from the tables and the config's budget."""
    tables = [router.quantiles for router in routed.routers]
    if routed.config["budget"] == "model":
        shared = shared_threshold(tables, sparsity)
        return [shared.to(table.device) for table in tables]
    return [interpolate(table, sparsity) for table in tables]


def shared_threshold(tables: Sequence[Tensor], sparsity: float) -> Tensor:
    """The logit below which this share of all sites' experts lies; each site counts alike. tables: [101] each."""
    device = tables[0].device
    if sparsity == 0.0:
        return tables[0].new_tensor(-torch.inf)
    grid = torch.linspace(0.0, 1.0, SHARED_POINTS, dtype=torch.float32, device=device)
    pooled = torch.cat([quantiles(table.to(device), grid) for table in tables])
    return quantiles(pooled, tables[0].new_tensor(sparsity))


def update_table(routed: Routed, batches: Iterable[Batch]) -> None:
    """New tables of thresholds for every router, from its logits on these batches, seen through the present gates.

    A router that no token reached keeps its table; one that many reached gets it from `table_tokens` of them.
    """
    samples = {site.name: Reservoir(table_tokens(site.n_experts)) for site in routed.sites}
    present = routed.routers[0].mode

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        samples[site.name].add(token_masks.tokens_of(router, logits))

    with mode_of(routed, "hard" if present == "dense" else present), on_logits(routed, see):
        run_batches(routed.model, batches)
    for site, router in routed:
        if len(samples[site.name]):
            table = table_of(samples[site.name].rows())
            require_finite(site.name, table)
            router.quantiles.copy_(table)


def place_threshold(router: Router, table: Tensor, threshold: Tensor) -> None:
    """Take over a new table of logits; the bias moves, so that this threshold is logit(tau), as in the paper."""
    with torch.no_grad():
        if router.bias is None:
            router.quantiles.copy_(table)
            router.threshold.copy_(threshold)
            return
        keep(router.bias)
        shift = logit(router.tau) - threshold
        router.bias.add_(shift)
        router.quantiles.copy_(table + shift)
        router.threshold.fill_(logit(router.tau))


def move_biases(routed: Routed, sparsity: float) -> None:
    """As `set_sparsity`, but where a router has a bias that moves, and the threshold is logit(tau) again afterwards.

    At 0 it stands below the calibration logits: no bias moves by infinity.
    """
    thresholds = thresholds_at(routed, sparsity)
    if sparsity == 0.0 and all(router.bias is not None for router in routed.routers):
        least = [router.quantiles[0] for router in routed.routers]
        shared = min(map(float, least)) if routed.config["budget"] == "model" else math.inf
        thresholds = [one.clamp_max(shared) - BIAS_MARGIN for one in least]
    for router, threshold in zip(routed.routers, thresholds, strict=True):
        place_threshold(router, router.quantiles, threshold)
