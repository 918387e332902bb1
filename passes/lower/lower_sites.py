"""Scope "ffn": each site's own forward, hooks or graph call the op. Nothing is compiled.

aligned: y = down(gate(act(up(x)), router(x)))  ->  y = lowered_ffn(router, up, None, down, x), in the owner's forward
inline:  up hands zeros on, the hook of down notes x and runs lowered_ffn
graph:   as aligned, on the model's own graph, with the parameters that its nodes name
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from operator import attrgetter

from torch import nn
from torch.fx import Graph, GraphModule, Node

from ltepass.errors import LoweringError
from ltepass.passes.capture.trace_owner import trace_owner
from ltepass.passes.graph.edit import erase_upstream
from ltepass.passes.insert.check_activation import idle_values
from ltepass.passes.insert.generated_forwards import forwards_of, regenerate
from ltepass.passes.insert.hooks import SparseDown, attach
from ltepass.passes.insert.insert_routers import inline_site, insert_gates, relative
from ltepass.passes.lower.bypassed_modules import called_between, called_modules, idle, settings
from ltepass.passes.lower.lowered_forward import Plan, lowered_ffn, lowered_in_graph, plan_of
from ltepass.passes.lower.stubs import Stub, one_token_will_do
from ltepass.passes.lower.why_not_linear import is_conv1d
from ltepass.routed.gate import add_tiers
from ltepass.routed.gate import gate as gate_call
from ltepass.routed.routed import Routed, deciding
from ltepass.routed.sites import FFNSite, LTEState
from ltepass.routed.tiered_router import TieredRouter


def lower_sites(routed: Routed, sites: list[FFNSite]) -> None:
    """Every one of these sites calls the op, each kind in its own way."""
    model, state = routed.model, routed.state
    lowered = {s.name for s in sites}
    for site in sites:
        routed.router(site).plan = plan_of(model, site)
    for owner, group in _aligned(state):
        _regenerate(model.get_submodule(owner), group, lowered, tiered=routed.tiered)
    for owner in {s.owner for s in sites if s.kind == "inline"}:
        _lower_inline(model, owner, [s for s in state.sites if s.owner == owner], lowered)
    if isinstance(model, GraphModule):
        state.graph = model.graph
        graph = Graph()
        graph.output(graph.graph_copy(model.graph, {}))
        for site in sites:
            if site.kind == "graph":
                _call_op(model, graph, site)
        model.graph = graph


def unlower_sites(routed: Routed) -> None:
    """Forwards, hooks and graph of the sites as before `lower_sites`."""
    model, state = routed.model, routed.state
    for site, router in routed:
        router.plan = router.coded = None
        if isinstance(router, TieredRouter):
            router.packed_once = None
        if site.kind == "inline":
            for path in {site.up, site.gate or site.up, site.down}:
                model.get_submodule(path).__dict__.pop("forward", None)
            attach(model.get_submodule(site.owner), [inline_site(s) for s in state.sites if s.owner == site.owner])
    for owner, group in _aligned(state):
        _regenerate(model.get_submodule(owner), group, set(), tiered=routed.tiered)
    if isinstance(model, GraphModule):
        assert state.graph is not None, "lowering kept it"
        model.graph, state.graph = state.graph, None


def _aligned(state: LTEState) -> Iterator[tuple[str, list[FFNSite]]]:
    """The aligned sites by their owner."""
    aligned = sorted((s for s in state.sites if s.kind == "aligned"), key=lambda s: s.owner)
    return ((owner, list(group)) for owner, group in groupby(aligned, key=lambda s: s.owner))


def _regenerate(owner: nn.Module, sites: list[FFNSite], lowered: set[str], *, tiered: bool) -> None:
    """The owner's own forward with gates, and with the op where `lowered` names the site; swapped in one step."""
    graphs = trace_owner(owner)
    assert graphs is not None, "an aligned owner was traced before"
    for graph in graphs:
        insert_gates(graph, sites, tiered=tiered)
        for site in sites:
            if site.name in lowered:
                _call_op(owner, graph, site)
    regenerate(owner, forwards_of(graphs))


def _call_op(root: nn.Module, graph: Graph, site: FFNSite) -> None:
    """Replace the down call behind a site's gate by the op; what only fed it goes. root: what the graph belongs to."""
    router = relative(site, site.router)
    gated = next(
        n for n in graph.nodes if n.op == "call_function" and n.target is gate_call and n.args[0].target == router
    )
    (down,) = gated.users
    down = next((user for user in down.users if user.target is add_tiers), down)
    x, called = gated.args[2].args[0], called_modules(graph)
    inputs = {node: node.all_input_nodes for node in graph.nodes}
    paths = [None if p is None else relative(site, p) for p in (site.up, site.gate, site.down)]
    with graph.inserting_before(down):
        module = graph.get_attr(router)
        if site.kind == "graph":
            rows = (site.up_rows, site.up_bias, site.gate_rows, site.gate_bias, site.down_rows)
            params = [None if r is None else graph.get_attr(r.param) for r in rows]
            bias = None if site.down_bias is None else graph.get_attr(site.down_bias)
            linears: list[Node | None] = [graph.get_attr(p) for p in dict.fromkeys(paths) if p in called and p]
            new = graph.call_function(lowered_in_graph, (linears, (), module, *params, bias, x))
        else:
            linears = [None if p is None else graph.get_attr(p) for p in paths]
            new = graph.call_function(lowered_ffn, (module, *linears, x))
    down.replace_all_uses_with(new)
    erase_upstream(down)
    between = [p for p in called_between(root, inputs, set(graph.nodes)) if p not in paths]
    with graph.inserting_before(new):
        skipped = [graph.get_attr(path) for path in between]
    _note_skipped(root, router, between)
    new.args = (linears, skipped, *new.args[2:]) if site.kind == "graph" else (*new.args, *skipped)


def _note_skipped(root: nn.Module, path: str, skipped: list[str], *, runs: bool = False) -> None:
    """Of a lowered site's router at `path`: what stands at the paths `skipped` must stand there at every call, as it
    is.

    runs: these are called on zeros.
    """
    router = deciding(root.get_submodule(path))
    assert isinstance(router.plan, Plan), "made for every lowered site"
    held = tuple(attrgetter(p)(root) for p in skipped)
    router.plan = replace(router.plan, skipped=held, settings=tuple(settings(value, runs=runs) for value in held))


def _lower_inline(model: nn.Module, owner: str, sites: list[FFNSite], lowered: set[str]) -> None:
    """The up linears hand zeros on, and the down linear runs the whole FFN from the x that was noted."""
    module, inline = model.get_submodule(owner), []
    for site in sites:
        plain_site = inline_site(site)
        if site.name not in lowered:
            inline.append(plain_site)
            continue
        inline.append(replace(plain_site, lowered=True))
        ups = dict.fromkeys((site.up, site.gate or site.up))
        one_token = one_token_will_do(module, [relative(site, path) for path in ups], relative(site, site.down))
        for linear in map(model.get_submodule, ups):
            width = linear.get_parameter("weight").shape[1 if is_conv1d(linear) else 0]
            linear.forward = Stub(width, one_token=one_token)
        skipped = idle(model, site) + idle_values(model, site)
        sparse = SparseDown(inline[-1], lowered_ffn, [relative(site, path) for path in skipped])
        _note_skipped(model, site.router, skipped, runs=True)
        model.get_submodule(site.down).forward = sparse
    attach(module, inline)


def require_hard(routed: Routed) -> None:
    """Raises LoweringError."""
    soft = [site.name for site, router in routed if router.mode != "hard"]
    if soft:
        raise LoweringError(
            f"{len(soft)} of {len(routed.sites)} routers are in {routed.routers[0].mode!r} mode; lowering expects "
            '"hard"; call ltepass.set_mode(model, "hard")'
        )
