"""find_ffn: regions of the graphs become FFN sites, or refusals with a reason.

    graph:   g = linear(x, Wg); u = linear(x, Wu); h = silu(g) * u; y = linear(h, Wd)
    value:   FFNSite(owner="layers.0.mlp", gate="...gate_proj", up="...up_proj", down="...down_proj", "silu", ...)

Changes nothing. A site is legal to gate because y = sum_i h_i Wd[:, i] is a sum over neurons, h_i depends on x alone
(proved by index propagation in match.py), and nobody outside the region sees h.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ltepass.errors import NoFFNFoundError
from ltepass.passes.capture.trace_owner import OwnerGraphs
from ltepass.passes.find.computed_weights import refuse_computed_weights
from ltepass.passes.find.group_size import check_group_size, with_group_size
from ltepass.passes.find.match import Miss, Region, match_down
from ltepass.passes.find.match_types import Found
from ltepass.passes.find.moe_stacks import refuse_expert_stacks
from ltepass.passes.find.region_to_site import one_kind_an_owner, place
from ltepass.passes.find.tied_weights import refuse_tied
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.routed.sites import FFNSite, Refusal, site_name
from ltepass.routed.which_sites import Match


@dataclass(frozen=True, kw_only=True)
class FindFFN:
    name: str = "find_ffn"
    tier: Tier = "exact"
    skippable: bool = False

    def __call__(self, job: TransformJob) -> str:
        found: list[Found] = []
        for captured in job.captured:
            here, refusals = find_in(job.model, captured, job.owner_graphs, job.selection.match)
            found += here
            job.refusals += refusals
        kept, tied = refuse_tied(found, job.captured)
        job.refusals += tied
        job.refusals = told_as_quantised(job.model, job.refusals)
        kept, left_out = job.selection.split(number_sites(one_kind_an_owner(kept)))
        job.refusals += left_out
        sizes = job.selection.group_sizes(kept, job.config.group_size)
        alone = job.config.router == "proxy"
        job.sites = name_routers(job.model, [with_group_size(s, size, alone=alone) for s, size in sizes.items()])
        if not job.sites:
            lines = [f"  {r.module or '(root)'}: {r.check}: {r.reason}" for r in job.refusals]
            raise NoFFNFoundError(
                f"no FFN site found in {type(job.model).__name__}; expected a linear that reads act(up(x)) or "
                "act(gate(x)) * up(x); refusals:\n" + ("\n".join(lines) or "  (no candidate at all)")
            )
        for size in dict.fromkeys(sizes.values()):
            check_group_size([s for s, wanted in sizes.items() if wanted == size], size)
        return f"{len(job.sites)} sites, {len(job.refusals)} refusals"


def find_in(
    root: nn.Module, captured: Captured, traced: dict[str, OwnerGraphs | None], match: Match
) -> tuple[list[Found], list[Refusal]]:
    """Sites and near misses of one graph."""
    found: list[Found] = []
    refusals: list[Refusal] = []
    for node in captured.flow.nodes():
        linear = captured.flow.linear(node)
        if linear is None:
            continue
        with torch.device("cpu"):  # whatever torch.set_default_device says: a match runs on numbers of ours
            region = match_down(captured.flow, linear, match)
        if isinstance(region, Miss):
            if region.near:
                refusals.append(_refusal(captured, linear.node, region))
            continue
        site = place(root, captured, region, traced)
        if isinstance(site, Refusal):
            refusals.append(site)
        else:
            found.append(Found(site, captured, _products(region)))
    return found, refusals + refuse_expert_stacks(captured) + refuse_computed_weights(captured)


def told_as_quantised(model: nn.Module, refusals: list[Refusal]) -> list[Refusal]:
    """With one refusal for all linears of torchao's weights, whose graph shows how they are computed and no linear."""
    held = {path: m.weight for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantised = {path: type(w).__name__ for path, w in held.items() if type(w).__module__.startswith("torchao.")}
    if not quantised:
        return refusals
    first, kind = next(iter(quantised.items()))
    reason = (
        f"its weight is torchao's {kind}, as those of {len(quantised)} linears, which were quantised before the "
        'transform; transform the model first and quantise it then: lower(linears="int8") reads an Int8Tensor'
    )
    rest = [r for r in refusals if r.module not in quantised]
    return [*rest, Refusal(module=first, node="", check="weight", reason=reason)]


def _products(region: Region) -> frozenset[Node]:
    linears = [region.up.linear, region.down] + ([region.gate.linear] if region.gate else [])
    return frozenset({*(n.product for n in linears), *(n.node for n in linears), *region.inner})


def _refusal(captured: Captured, down: Node, miss: Miss) -> Refusal:
    return Refusal(
        module=captured.stack(down)[-1], node=down.name, check=miss.check, reason=miss.reason, nearest=miss.nearest
    )


def number_sites(sites: Iterable[FFNSite]) -> list[FFNSite]:
    """With a number in the name where an owner has several sites."""
    sites = list(sites)
    several, seen, named = Counter(s.owner for s in sites), Counter[str](), []
    for s in sites:
        named.append(s if several[s.owner] == 1 else replace(s, name=site_name(s, str(seen[s.owner]))))
        seen[s.owner] += 1
    return named


def name_routers(root: nn.Module, sites: Iterable[FFNSite]) -> list[FFNSite]:
    """A free attribute of the owner for each router: `router`, or `lte_router`, numbered as the site is."""
    named = []
    for s in sites:
        owner = root.get_submodule(s.owner)
        base = "lte_router" if hasattr(owner, "router") or isinstance(root, GraphModule) else "router"
        name = base if s.name == site_name(s, None) else f"{base}_{s.number}"
        named.append(replace(s, router=".".join(p for p in (s.owner, name) if p)))
    return named
