"""From a matched region to a site: which module owns it, and how the owner can be gated.

aligned: the owner's forward is regenerated around its linear modules. inline: guarded hooks on the linear modules.
graph: two nodes in a user's GraphModule. Each needs the products where it looks for them: modules that are a linear and
nothing else, or nodes of the user's own graph.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn
from torch.fx import Graph, GraphModule, Node

from ltepass.passes.capture.guard_replaced_forwards import is_replaced
from ltepass.passes.capture.trace_owner import OwnerGraphs, trace_owner
from ltepass.passes.find.match import Region, Rows, down_rows
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Linear
from ltepass.passes.graph.node_kinds import is_movement, shape
from ltepass.passes.graph.walk import strip_identity
from ltepass.routed.sites import FFNSite, NeuronRows, Refusal


def place(
    root: nn.Module, captured: Captured, region: Region, traced: dict[str, OwnerGraphs | None]
) -> FFNSite | Refusal:
    """The site of a region, without group size and router name; a refusal where no way of gating fits its owner.

    traced: by path, the graphs of owners that were asked about; those of this one are added.
    """
    linears = [region.up.linear, region.down] + ([region.gate.linear] if region.gate else [])
    site = _site(captured, region, _owner(captured, region, linears))
    for rows in site.neurons:
        if not _is_parameter(root, rows.param):  # a buffer or a constant may be in no checkpoint, its new order neither
            reason = f"{rows.param} has an entry for each neuron, and only an nn.Parameter is permuted with them"
            return _refusal(site, region, reason)
    if isinstance(root, GraphModule) and len({_origin(n.product) for n in linears}) == len(
        {n.product for n in linears}
    ):
        nodes = _graph_nodes(captured, region)
        if nodes is None:
            return _refusal(site, region, "a module of the graph computes more than one of the FFN's linears")
        return replace(site, owner="", name=site.down, kind="graph", nodes=nodes)
    for linear in linears:
        if not _is_module(captured, linear):
            where = holder(captured, linear) or "the root"
            return _refusal(site, region, f"a product with parameters of {where}: no linear module to gate around")
    return _in_modules(root, site, region, traced)


def holder(captured: Captured, linear: Linear) -> str:
    """Path of the module that holds a linear's weight: of several that share it, the one that is called here."""
    name = captured.flow.leaves[linear.weight]
    caller = captured.stack(linear.product)[-1]
    if caller in captured.sharers.get(name, ()):
        return caller
    path = name.rpartition(".")[0]
    return captured.aliases.get(path, path)


def _owner(captured: Captured, region: Region, linears: list[Linear]) -> str:
    """Which module owns a region: the innermost one whose call contains all of it, and that is none of its linears."""
    calls = [captured.stack(n) for n in (*(n.product for n in linears), *region.inner)]
    modules = {holder(captured, n) for n in linears if _is_module(captured, n)}
    common = [p for p in calls[0] if all(p in c for c in calls) and (p not in modules or p == "")]
    return common[-1] if common else ""


def _site(captured: Captured, region: Region, owner: str) -> FFNSite:
    up, down = holder(captured, region.up.linear), holder(captured, region.down)

    def named(rows: Rows | None) -> NeuronRows | None:
        if rows is None:
            return None
        return NeuronRows(param=captured.flow.leaves[rows.leaf], dim=rows.dim, start=rows.start, step=rows.step)

    return FFNSite(
        name=owner or down,
        owner=owner,
        kind="inline",
        router="",
        up=up,
        gate=holder(captured, region.gate.linear) if region.gate else None,
        down=down,
        activation=region.activation,
        d_model=shape(region.x)[-1],
        out_width=None if region.down.width == shape(region.x)[-1] else region.down.width,
        d_ff=region.d_ff,
        up_rows=named(region.up.rows),  # type: ignore[arg-type]
        up_bias=named(region.up.bias),
        gate_rows=named(region.gate.rows) if region.gate else None,
        gate_bias=named(region.gate.bias) if region.gate else None,
        down_rows=named(down_rows(region.down)),  # type: ignore[arg-type]
        down_bias=_down_bias(captured, region.down),
        neurons=tuple(n for n in map(named, region.neurons) if n),
    )


def _down_bias(captured: Captured, down: Linear) -> str | None:
    """The bias that the down product itself adds; one that is added after it stays where it is."""
    if not isinstance(down.bias, Node):
        return None
    leaf = captured.flow.leaf(down.bias)
    name = captured.flow.leaves[leaf[0]] if leaf else None
    if down.node is down.product or _origin(down.node) is _origin(down.product) is not down.product:
        return name
    return name if name and name.rpartition(".")[0] == holder(captured, down) else None


def _is_parameter(root: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    return own in root.get_submodule(path)._parameters


def _is_module(captured: Captured, linear: Linear) -> bool:
    """Whether the linear is a module's call and that module computes nothing else."""
    path = holder(captured, linear)
    if captured.stack(linear.product)[-1] != path or path == captured.prefix:
        return False
    return captured.only_linears(path)


def _refusal(site: FFNSite, region: Region, reason: str) -> Refusal:
    return Refusal(module=site.owner, node=region.down.node.name, check="owner", reason=reason, nearest=site.down)


def _origin(node: Node) -> Node:
    """The node of the user's own graph that a node of the normalised copy stands for."""
    return node.meta.get("origin", node)  # type: ignore[no-any-return]


def _graph_nodes(captured: Captured, region: Region) -> tuple[str, str, str] | None:
    """Names of x, the hidden units and the down product in the user's graph; None where a module hides one of them."""
    ends = []
    for linear in (region.up.linear, region.down):
        product = _origin(linear.product)
        if product.op == "call_module":
            inside = [n for n in captured.flow.nodes() if _origin(n) is product]
            if not all(n.op == "get_attr" or _belongs(n, linear) for n in inside):
                return None
            argument = product.args[0] if product.args else None
        else:
            argument = product.args[linear.product.args.index(linear.x)]
        if not isinstance(argument, Node):
            return None
        ends.append((argument, product))
    (x, _), (h, down) = ends
    return x.name, h.name, down.name


def _belongs(node: Node, linear: Linear) -> bool:
    return node in (linear.product, linear.node) or is_movement(node) or strip_identity(node) is not node


def _in_modules(
    root: nn.Module, site: FFNSite, region: Region, traced: dict[str, OwnerGraphs | None]
) -> FFNSite | Refusal:
    """Aligned where the owner's forward can be regenerated around the two linears, else inline hooks on them."""
    owner = root.get_submodule(site.owner)
    if site.owner not in traced:
        traced[site.owner] = None if is_replaced(owner) else trace_owner(owner)
    graphs = traced[site.owner]
    if graphs is not None and all(_calls_once(g, site) for g in graphs):
        return replace(site, kind="aligned")
    if isinstance(owner, (nn.Sequential, nn.ModuleList)):
        return _refusal(site, region, f"{type(owner).__name__}.forward cannot be regenerated")
    return site


def one_kind_an_owner(sites: list[FFNSite]) -> list[FFNSite]:
    """An owner is gated in one way: where one of its sites needs hooks, all of them have hooks."""
    hooked = {s.owner for s in sites if s.kind == "inline"}
    return [replace(s, kind="inline") if s.owner in hooked else s for s in sites]


def _calls_once(graph: Graph, site: FFNSite) -> bool:
    cut = len(site.owner) + 1 if site.owner else 0
    targets = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    return all(targets[path[cut:]] == 1 for path in (site.up, site.down))
