"""find_ffn: regions of the graphs become FFN sites, or refusals with a reason.

    graph:   g = linear(x, Wg); u = linear(x, Wu); h = silu(g) * u; y = linear(h, Wd)
    value:   FFNSite(owner="layers.0.mlp", gate="...gate_proj", up="...up_proj", down="...down_proj", "silu", ...)

Changes nothing. A site is legal to gate because y = sum_i h_i Wd[:, i] is a sum over neurons, h_i depends on x alone
(proved by index propagation in match.py), and nobody outside the region sees h.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule, Node

from ltepass.errors import GroupSizeError, NoFFNFoundError
from ltepass.passes.capture.owner_forward import OwnerGraphs
from ltepass.passes.find.match import Miss, Region, match_down
from ltepass.passes.find.moe_stacks import ExpertStack, find_experts
from ltepass.passes.find.owner import place
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.node_kinds import consumers, is_movement, op_name, strip_identity
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.routed.sites import FFNSite, NeuronRows, Refusal, site_name

TARGET_GROUP = 32  # the paper's group size


@dataclass(frozen=True, kw_only=True)
class FindFFN:
    name: str = "find_ffn"
    tier: Tier = "exact"
    skippable: bool = False

    def __call__(self, job: TransformJob) -> str:
        found: list[Found] = []
        for captured in job.captured:
            here, refusals = find_in(job.model, captured, job.owner_graphs)
            found += here
            job.refusals += refusals
        kept, tied = _without_ties(found, job.captured)
        job.refusals += tied
        kept, left_out = job.selection.split(_named(_one_kind(kept)))
        job.refusals += left_out
        sizes = job.selection.sizes(kept, job.config.group_size)
        job.sites = _name_routers(job.model, [_sized(s, size) for s, size in sizes.items()])
        if not job.sites:
            lines = [f"  {r.module or '(root)'}: {r.check}: {r.reason}" for r in job.refusals]
            raise NoFFNFoundError(
                f"no FFN site found in {type(job.model).__name__}; expected a linear that reads act(up(x)) or "
                "act(gate(x)) * up(x); refusals:\n" + ("\n".join(lines) or "  (no candidate at all)")
            )
        for size in dict.fromkeys(sizes.values()):
            _check_group_size([s for s, wanted in sizes.items() if wanted == size], size)
        return f"{len(job.sites)} sites, {len(job.refusals)} refusals"


@dataclass(frozen=True)
class Found:
    """A site as it stands in one graph. products: the nodes that read its linears' weights."""

    site: FFNSite
    captured: Captured
    products: frozenset[Node]


def find_in(
    root: nn.Module, captured: Captured, traced: dict[str, OwnerGraphs | None]
) -> tuple[list[Found], list[Refusal]]:
    """Sites and near misses of one graph."""
    found: list[Found] = []
    refusals: list[Refusal] = []
    for node in captured.flow.nodes():
        linear = captured.flow.linear(node)
        if linear is None:
            continue
        match = match_down(captured.flow, linear)
        if isinstance(match, Miss):
            if match.near:
                refusals.append(_refusal(captured, linear.node, match))
            continue
        site = place(root, captured, match, traced)
        if isinstance(site, Refusal):
            refusals.append(site)
        else:
            found.append(Found(site, captured, _products(match)))
    refusals += [_experts(captured, stack) for stack in find_experts(captured.flow)]
    return found, refusals


def _products(region: Region) -> frozenset[Node]:
    linears = [region.up.linear, region.down] + ([region.gate.linear] if region.gate else [])
    return frozenset({*(n.product for n in linears), *(n.node for n in linears), *region.inner})


def _refusal(captured: Captured, down: Node, miss: Miss) -> Refusal:
    return Refusal(
        module=captured.stack(down)[-1], node=down.name, check=miss.check, reason=miss.reason, nearest=miss.nearest
    )


def _experts(captured: Captured, stack: ExpertStack) -> Refusal:
    return Refusal(
        module=captured.stack(stack.node)[-1],
        node=stack.node.name,
        check="experts",
        reason=f"a stack of {stack.n_experts} experts behind the model's own router; the sparse op takes no stack",
        nearest=f"{stack.up}, {stack.down}",
    )


def _without_ties(found: Iterable[Found], captured: list[Captured]) -> tuple[list[FFNSite], list[Refusal]]:
    """One site for each module of an FFN, however often it is called; refused where others read its parameters.

    Else permuting its neurons, or gating them in one place, would change what the other place computes. Modules that
    share all of an FFN's weights (Zamba's blocks) are a site each, with a router each and one order of the neurons.
    """
    by_rows: dict[tuple[NeuronRows, ...], list[Found]] = defaultdict(list)
    for f in found:
        by_rows[f.site.neurons].append(f)
    claims = Counter(name for rows in by_rows for name in {r.param for r in rows})
    explained = {id(c): set[Node]() for c in captured}
    for f in found:
        explained[id(f.captured)] |= f.products
    elsewhere = {
        name
        for c in captured
        for leaf, name in c.flow.leaves.items()
        if name in claims and not _readers(leaf) <= explained[id(c)]
    }
    kept, refusals = [], []
    for rows, group in by_rows.items():
        site = group[0].site
        tied = next((r.param for r in rows if r.param in elsewhere or claims[r.param] > 1), None)
        sites = list(dict.fromkeys(f.site for f in group))
        if tied is None and any(s.kind == "graph" for s in sites[1:]):
            tied = rows[0].param  # a graph's site is one place in it: the other would stay dense
        if tied is None:
            kept += sites
        else:
            reason = f"{tied} is also used elsewhere, so its neurons cannot be permuted or gated here alone"
            refusals.append(Refusal(module=site.owner, node=site.down, check="tied", reason=reason))
    return kept, refusals


def _one_kind(sites: list[FFNSite]) -> list[FFNSite]:
    """An owner is gated in one way: where one of its sites needs hooks, all of them have hooks."""
    hooked = {s.owner for s in sites if s.kind == "inline"}
    return [replace(s, kind="inline") if s.owner in hooked else s for s in sites]


def _readers(leaf: Node) -> set[Node]:
    """The nodes that compute with a leaf, seen through casts and transposes."""
    readers: set[Node] = set()
    stack = [leaf]
    while stack:
        for user in consumers(stack.pop()):
            if is_movement(user) or strip_identity(user) is not user:
                stack.append(user)
            elif op_name(user) not in ("size", "sym_size", "getattr"):
                readers.add(user)
    return readers


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def auto_group_size(d_ff: int) -> int:
    """The divisor of d_ff nearest to 32 (in ratio), the larger one of two."""
    return nearest_divisors(d_ff, TARGET_GROUP)[0]


def nearest_divisors(n: int, size: int) -> list[int]:
    """Divisors of n, the nearest to `size` (in ratio) first, of two equally near the larger."""
    return sorted(divisors(n), key=lambda d: (max(d, size) / min(d, size), -d))


def _sized(site: FFNSite, group_size: int | str) -> FFNSite:
    return replace(site, group_size=auto_group_size(site.d_ff) if isinstance(group_size, str) else group_size)


def _check_group_size(sites: list[FFNSite], group_size: int | str) -> None:
    if isinstance(group_size, str):
        return
    bad = [s for s in sites if s.d_ff % group_size]
    if bad:
        near = {s.d_ff: nearest_divisors(s.d_ff, group_size)[:3] for s in bad}
        raise GroupSizeError(
            f"group_size {group_size} does not divide d_ff at {', '.join(f'{s.name} ({s.d_ff})' for s in bad)}; "
            f'expected a divisor; nearest: {"; ".join(f"{f}: {sorted(ds)}" for f, ds in near.items())}; or pass "auto"'
        )


def _named(sites: Iterable[FFNSite]) -> list[FFNSite]:
    """With a number in the name where an owner has several sites."""
    sites = list(sites)
    several, seen, named = Counter(s.owner for s in sites), Counter[str](), []
    for s in sites:
        named.append(s if several[s.owner] == 1 else replace(s, name=site_name(s, str(seen[s.owner]))))
        seen[s.owner] += 1
    return named


def _name_routers(root: nn.Module, sites: Iterable[FFNSite]) -> list[FFNSite]:
    """A free attribute of the owner for each router: `router`, or `lte_router`, numbered as the site is."""
    named = []
    for s in sites:
        owner = root.get_submodule(s.owner)
        base = "lte_router" if hasattr(owner, "router") or isinstance(root, GraphModule) else "router"
        name = base if s.name == site_name(s, None) else f"{base}_{s.number}"
        named.append(replace(s, router=".".join(p for p in (s.owner, name) if p)))
    return named
