"""group_neurons: one permutation per site, so that every expert is a contiguous run of neurons.

    before:  h[j] from row j of gate and up, column j of down
    after:   h[j] from row perm[j] of gate and up, column perm[j] of down

Legal because y = sum_j h_j Wd[:, j] does not depend on the order of j. Names, shapes and values stay; only the order of
rows and columns changes, in place. Methods that use activations run in `ltepass.calibrate`, through the same function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError, ConfigError, MetaWeightsError
from ltepass.grouping_methods import AUTO, AUTO_WITH_DATA, GROUPINGS, Neurons
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.passes.group.balanced_kmeans import balanced_kmeans
from ltepass.progress import steps
from ltepass.routed.offloaded import is_offloaded
from ltepass.routed.routed import Routed
from ltepass.routed.samples import Sample, collect
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import undo_by
from ltepass.sparsity.thresholds import is_calibrated


@dataclass(frozen=True, kw_only=True)
class GroupNeurons:
    name: str = "group_neurons"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: TransformJob) -> str:
        method = job.config.grouping
        if method in (AUTO, "identity"):  # auto is identity until data comes
            return "unchanged"
        if GROUPINGS[method].data == "needed" and not job.has_calibration:
            raise CalibrationError(
                f"grouping {method!r} needs activations and no calibration was given; expected transform(..., "
                'calibration=batches); pass batches, or choose "kmeans" or "identity"'
            )
        if GROUPINGS[method].data != "unused" and job.has_calibration:  # waits for the batches
            return "unchanged"
        check_real_weights(job.model, job.sites, f"grouping {method!r}")
        sites = {s.neurons: s for s in job.sites}  # sites that share their weights share their order
        permutations = {n: site_permutation(job.model, s, method, None, job.config.seed) for n, s in sites.items()}
        for neurons, site in sites.items():
            permute_site(job.model, site, permutations[neurons])
        job.permutations = {s.name: permutations[s.neurons] for s in job.sites}
        return f"{len(permutations)} sites permuted"


def check_real_weights(model: nn.Module, sites: list[FFNSite], what: str) -> None:
    """Raises MetaWeightsError where a site's neurons are on the meta device: these cannot be put in another order."""
    for site in sites:
        for row in site.neurons:
            if model.get_parameter(row.param).is_meta:
                raise MetaWeightsError(
                    f"{what} needs real weights and {row.param} is on the meta device; expected loaded weights; load "
                    'them first, or use grouping="identity"'
                )


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
    """up, gate: [d_ff, d_model]; down: [d_ff, d_out], one row per neuron -> [d_ff] int64, a permutation.

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
    with torch.device("cpu"):  # where orders are made, whatever torch.set_default_device says
        neurons = Neurons(up=up, gate=gate, down=down, x=x, h=h)
        return grouping.order(neurons, partial(_clustered, group_size, seed), seed)


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
        _reorder(partial(rows.take, model.get_parameter(rows.param), site.d_ff), permutation)


def permute_routed(routed: Routed, site: FFNSite, permutation: Tensor) -> None:
    """As `permute_site`, and its routers' record of the order.

    Sites that share their weights have a router each: permute one of them, and all are done.
    """
    permute_site(routed.model, site, permutation)
    with torch.no_grad():
        for same in [s for s in routed.sites if s.neurons == site.neurons]:
            for router in routed.copies(same):
                router.reorder(permutation)


def _reorder(view: Callable[[], Tensor], order: Tensor) -> None:
    """view() becomes view()[order], in place; a call that fails puts the rows back."""
    step = _Reorder(view, order)
    undo_by(step.undo)
    step.do()


class _Reorder:
    """How far it came stands in one attribute, so that no interruption falls between the change and its record."""

    def __init__(self, view: Callable[[], Tensor], order: Tensor) -> None:
        self.view, self.order = view, order
        self.content: Tensor | bool = False  # not begun; the new rows while they are written; True afterwards

    @torch.no_grad()
    def do(self) -> None:
        """Rows are written in the new order."""
        rows = self.view()
        self.content = rows[self.order.to(rows.device)]
        rows.copy_(self.content)
        self.content = True

    @torch.no_grad()
    def undo(self) -> None:
        """Rows are written in the order that the neurons had."""
        if self.content is not False:
            rows = self.view()
            new = rows if self.content is True else self.content
            rows.copy_(new[self.order.argsort().to(rows.device)])


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
        away = [site for site in routed.sites if is_offloaded(routed.model, site)]
        for site in steps("grouping neurons", [site for site in routed.sites if site not in away]):
            if site.neurons not in orders:
                sample, seed = samples[site.name], routed.config["seed"]
                orders[site.neurons] = site_permutation(routed.model, site, method, sample, seed)
                permute_routed(routed, site, orders[site.neurons])
        if away:
            warnings.warn(
                f"{len(away)} FFNs keep the order of their neurons ({away[0].name} first): their weights are offloaded "
                "and no other can be written there; calibrate where the model fits into memory, or pass "
                "grouping='identity'",
                stacklevel=2,
            )
            return  # so that a later call groups them
    routed.state.grouping = method
