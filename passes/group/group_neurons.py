"""group_neurons: one permutation per site, so that every expert is a contiguous run of neurons.

    before:  h[j] from row j of gate and up, column j of down
    after:   h[j] from row perm[j] of gate and up, column perm[j] of down

Legal because y = sum_j h_j Wd[:, j] does not depend on the order of j. Names, shapes and values stay; only the order of
rows and columns changes, in place. Methods that use activations run in `ltepass.calibrate`, through the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ltepass.errors import CalibrationError, MetaWeightsError
from ltepass.grouping_methods import AUTO, GROUPINGS
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.passes.group.permutations import permute_site, site_permutation
from ltepass.routed.sites import FFNSite


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
    for site in sites:
        for row in site.neurons:
            if model.get_parameter(row.param).is_meta:
                raise MetaWeightsError(
                    f"{what} needs real weights and {row.param} is on the meta device; expected loaded weights; load "
                    'them first, or use grouping="identity"'
                )
