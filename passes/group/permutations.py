"""Which neurons become one expert (paper section 4.1): exactly balanced groups, as a permutation of the neurons."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError, ConfigError
from ltepass.grouping_methods import GROUPINGS, Neurons
from ltepass.passes.group.balanced_kmeans import balanced_kmeans
from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import reorder
from ltepass.routed.watching import Sample


def grouping_permutation(
    method: str,
    *,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    sample: Sample | None,
    group_size: int,
    seed: int,
) -> Tensor:
    """up, gate: [d_ff, d_model]; down: [d_ff, d_model], one row per neuron -> [d_ff] int64, a permutation.

    sample: what the site saw, h in its present neuron order. method: one of `ltepass.grouping_methods`.
    New neuron i was neuron permutation[i]; expert e is new neurons [e * group_size, (e + 1) * group_size).
    Deterministic for a seed. Raises CalibrationError where a sample is needed and missing, ConfigError.
    """
    if method not in GROUPINGS:
        raise ConfigError(f"grouping is {method!r}; expected one of {', '.join(GROUPINGS)}; pass one of these")
    grouping = GROUPINGS[method]
    if grouping.data == "needed" and sample is None:
        raise CalibrationError(f"grouping {method!r} needs activations; expected calibration batches; pass them")
    x, h = (None, None) if sample is None else (sample.x, sample.h)
    return grouping.order(Neurons(up=up, gate=gate, down=down, x=x, h=h), partial(_clustered, group_size, seed), seed)


def _clustered(group_size: int, seed: int, points: Tensor) -> Tensor:
    return balanced_kmeans(points.cpu(), group_size, seed=seed).argsort(stable=True)


def site_permutation(model: nn.Module, site: FFNSite, method: str, sample: Sample | None, seed: int) -> Tensor:
    """A method's permutation of one site's neurons; sample may be None for methods that need no data."""
    up, down = (rows.of(model, site.d_ff).detach() for rows in (site.up_rows, site.down_rows))
    gate = site.gate_rows.of(model, site.d_ff).detach() if site.gate_rows else None
    return grouping_permutation(
        method, up=up, gate=gate, down=down, sample=sample, group_size=site.group_size, seed=seed
    )


def permute_site(model: nn.Module, site: FFNSite, permutation: Tensor) -> None:
    """Reorder a site's neurons in place: every slice in `site.neurons`.

    permutation: [d_ff] int64; new neuron i is old neuron permutation[i]. Names, shapes and strides stay.
    """
    if sorted(permutation.tolist()) != list(range(site.d_ff)):
        raise ConfigError(f"{site.name}: expected a permutation of {site.d_ff} neurons")
    for rows in site.neurons:
        reorder(partial(rows.take, model.get_parameter(rows.param), site.d_ff), permutation)


def permute_routed(routed: Routed, site: FFNSite, permutation: Tensor) -> None:
    """As `permute_site`, and its routers' record of the order.

    Sites that share their weights have a router each: permute one of them, and all are done.
    """
    permute_site(routed.model, site, permutation)
    with torch.no_grad():
        for same in [s for s in routed.sites if s.neurons == site.neurons]:
            for router in routed.copies(same):
                router.reorder(permutation)
