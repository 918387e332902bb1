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

from torch import nn
from torch.fx import Graph, GraphModule, Node

from ltepass.capture import Captured
from ltepass.dataflow import Linear, op_name
from ltepass.errors import GroupSizeError, NoFFNFoundError
from ltepass.match import Miss, Region, Rows, down_rows, match_down
from ltepass.pipeline import Job
from ltepass.regenerate import trace_owner
from ltepass.sites import FFNSite, NeuronRows, Refusal

TARGET_GROUP = 32  # the paper's group size


@dataclass(frozen=True, kw_only=True)
class FindFFN:
    name: str = "find_ffn"

    def __call__(self, job: Job) -> str:
        sites: dict[tuple[NeuronRows, ...], FFNSite] = {}
        for captured in job.captured:
            found, refusals = find_in(job.model, captured)
            sites.update((s.neurons, s) for s in found if s.neurons not in sites)  # a shared FFN is one site
            job.refusals += refusals
        kept, tied = _without_ties(sites.values(), job.captured)
        job.refusals += tied
        job.sites = _name_routers(job.model, [_sized(s, job.config.group_size) for s in kept])
        if not job.sites:
            lines = [f"  {r.module or '(root)'}: {r.check}: {r.reason}" for r in job.refusals]
            raise NoFFNFoundError(
                f"no FFN site found in {type(job.model).__name__}; expected a linear that reads act(up(x)) or "
                "act(gate(x)) * up(x); refusals:\n" + ("\n".join(lines) or "  (no candidate at all)")
            )
        _check_group_size(job.sites, job.config.group_size)
        return f"{len(job.sites)} sites, {len(job.refusals)} refusals"


def find_in(root: nn.Module, captured: Captured) -> tuple[list[FFNSite], list[Refusal]]:
    """Sites and near misses of one graph."""
    sites: list[FFNSite] = []
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
        site = _site(root, captured, match)
        if isinstance(site, Refusal):
            refusals.append(site)
        else:
            sites.append(site)
    return sites, refusals


def _refusal(captured: Captured, down: Node, miss: Miss) -> Refusal:
    return Refusal(
        module=captured.stack(down)[-1], node=down.name, check=miss.check, reason=miss.reason, nearest=miss.nearest
    )


def _site(root: nn.Module, captured: Captured, region: Region) -> FFNSite | Refusal:
    up, down = _holder(captured, region.up.linear), _holder(captured, region.down)
    gate = _holder(captured, region.gate.linear) if region.gate else None
    calls = [captured.stack(n) for n in (region.up.linear.node, *region.inner, region.down.node)]
    calls += [captured.stack(region.gate.linear.node)] if region.gate else []
    modules = {up, gate, down}
    owner = [p for p in calls[0] if all(p in c for c in calls) and (p not in modules or p == "")][-1]

    def named(rows: Rows | None) -> NeuronRows | None:
        if rows is None:
            return None
        return NeuronRows(param=captured.flow.leaves[rows.leaf], dim=rows.dim, start=rows.start, step=rows.step)

    site = FFNSite(
        name=owner or down,
        owner=owner,
        kind="inline",
        router="",
        up=up,
        gate=gate,
        down=down,
        activation=region.activation,
        d_model=region.down.width,
        d_ff=region.d_ff,
        up_rows=named(region.up.rows),  # type: ignore[arg-type]
        up_bias=named(region.up.bias),
        gate_rows=named(region.gate.rows) if region.gate else None,
        gate_bias=named(region.gate.bias) if region.gate else None,
        down_rows=named(down_rows(region.down)),  # type: ignore[arg-type]
        down_bias=captured.flow.leaves.get(region.down.bias) if region.down.bias is not None else None,
        neurons=tuple(n for n in map(named, region.neurons) if n),
    )
    if isinstance(root, GraphModule) and _origin(region.up.linear.node) is not _origin(region.down.node):
        return _graph_site(site, region)
    return _placed(root, site, region)


def _holder(captured: Captured, linear: Linear) -> str:
    """Path of the module that holds a linear's weight (its first owner, where it is shared)."""
    return captured.flow.leaves[linear.weight].rpartition(".")[0]


def _origin(node: Node) -> Node:
    """The node of the user's own graph that a node of the normalised copy stands for."""
    return node.meta.get("origin", node)  # type: ignore[no-any-return]


def _graph_site(site: FFNSite, region: Region) -> FFNSite:
    """A site in the user's own graph: the nodes between which the two new nodes go."""
    up, down = _origin(region.up.linear.node), _origin(region.down.node)
    first = 1 if op_name(region.up.linear.node) == "addmm" and up.op == "call_function" else 0
    x = up.args[first]
    h = down.args[1 if op_name(region.down.node) == "addmm" and down.op == "call_function" else 0]
    assert isinstance(x, Node)
    assert isinstance(h, Node)
    return replace(site, owner="", name=site.down, kind="graph", nodes=(x.name, h.name, down.name))


def _placed(root: nn.Module, site: FFNSite, region: Region) -> FFNSite | Refusal:
    """Aligned where the owner's forward can be regenerated around the two linears, else inline hooks on them."""
    owner = root.get_submodule(site.owner)
    graphs = trace_owner(owner)
    if graphs is not None and all(_calls_once(g, site) for g in graphs):
        return replace(site, kind="aligned")
    holds = all(site.owner != p for p in (site.up, site.down))
    if not holds or isinstance(owner, (nn.Sequential, nn.ModuleList)):
        return Refusal(
            module=site.owner,
            node=region.down.node.name,
            check="owner",
            reason=f"{type(owner).__name__}.forward cannot be regenerated, and its linears are no modules to hook",
        )
    return site


def _calls_once(graph: Graph, site: FFNSite) -> bool:
    cut = len(site.owner) + 1 if site.owner else 0
    targets = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    return all(targets[path[cut:]] == 1 for path in (site.up, site.down))


def _without_ties(sites: Iterable[FFNSite], captured: list[Captured]) -> tuple[list[FFNSite], list[Refusal]]:
    """Refuse sites whose parameters are read by something that is not a site."""
    sites = list(sites)
    uses: Counter[str] = Counter()
    for c in captured:
        for leaf, name in c.flow.leaves.items():
            uses[name] += len({u.meta.get("nn_module_stack") and c.stack(u)[-1] for u in leaf.users})
    claims = Counter(name for s in sites for name in {r.param for r in s.neurons})
    kept, refusals = [], []
    for s in sites:
        tied = next((r.param for r in s.neurons if max(uses[r.param], claims[r.param]) > 1), None)
        if tied is None:
            kept.append(s)
        else:
            reason = f"{tied} is also used elsewhere, so its neurons cannot be permuted or gated here alone"
            refusals.append(Refusal(module=s.owner, node=s.down, check="tied", reason=reason))
    return kept, refusals


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


def _name_routers(root: nn.Module, sites: list[FFNSite]) -> list[FFNSite]:
    """A free attribute of the owner for each router: `router`, or `lte_router`, numbered where an owner has several."""
    several = Counter(s.owner for s in sites)
    seen: Counter[str] = Counter()
    named = []
    for s in sites:
        owner = root.get_submodule(s.owner)
        base = "lte_router" if hasattr(owner, "router") or isinstance(root, GraphModule) else "router"
        name = base if several[s.owner] == 1 else f"{base}_{seen[s.owner]}"
        unique = s.name if several[s.owner] == 1 else f"{s.owner}#{seen[s.owner]}".lstrip("#")
        seen[s.owner] += 1
        named.append(replace(s, router=".".join(p for p in (s.owner, name) if p), name=unique))
    return named
