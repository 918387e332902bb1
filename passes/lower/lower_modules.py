"""Lower a model in place: FFNs call the sparse op `ltepass::routed_ffn` directly, other linears `ltepass::linear`.

scope "ffn": nothing is compiled, so there are no guards, no recompiles and no limit on lengths.
scope "model": the `lte` backend compiles the whole model and lowers the same regions in Dynamo's graph.
`state_dict`, checkpoints and names never change; `unlower` gives back what was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from ltepass.config import Scope
from ltepass.errors import ConfigError, LoweredError, LoweringError
from ltepass.kernels.gpu.tuning import assume_density
from ltepass.kernels.routed_ffn import routed_ffn, routed_proxy_ffn
from ltepass.passes.capture.owner_forward import trace_owner
from ltepass.passes.graph.node_kinds import erase_upstream
from ltepass.passes.insert.guarding import check_forwards
from ltepass.passes.insert.hooks import SparseDown, attach
from ltepass.passes.insert.insert_routers import inline_site, insert_gates, relative
from ltepass.passes.insert.regenerated_forwards import forwards_of, regenerate
from ltepass.passes.lower.compiled import compile_model, is_compiled, uncompile_model
from ltepass.passes.lower.linear_modules import lower_linear_modules, lowered_linears, unlower_linear_modules
from ltepass.passes.lower.operands import fits, is_whole
from ltepass.passes.lower.stubs import Stub, one_token_will_do
from ltepass.passes.lower.why_not import (
    GLOBAL_HOOK,
    bypassed_code,
    idle,
    is_conv1d,
    is_ordinary,
    not_plain,
    parameters_of,
    plain,
    untouched,
    why_not,
    why_not_alone,
    with_inner,
)
from ltepass.routed.proxy import ProxyRouter
from ltepass.routed.routed import Routed, is_transformed
from ltepass.routed.router import Router, applied
from ltepass.routed.router import gate as gate_call
from ltepass.routed.sites import FFNSite, NeuronRows, require_whole, unwrapped
from ltepass.routed.undo import all_or_nothing, lay_as, verb
from ltepass.sparsity.thresholds import remember_densities
from ltepass.threads import interfered, require_own, unshared

log = logging.getLogger("ltepass")


@dataclass(frozen=True)
class Plan:
    """How one site's weights are read by the op. Rows are None where the whole parameter is the operand."""

    activation: str
    d_ff: int
    up: NeuronRows | None
    gate: NeuronRows | None
    up_bias: NeuronRows | None
    gate_bias: NeuronRows | None
    down_transposed: bool


def lower_model(model: nn.Module, scope: Scope, *, ffn: bool) -> nn.Module:
    """What `ltepass.lower` does."""
    if ffn or is_transformed(model):
        return _lower(model, scope, ffn)
    root = unwrapped(model)
    all_or_nothing(root, lambda: _lower_dense(root, scope))
    return model


@verb
def _lower(model: nn.Module, scope: Scope, ffn: bool) -> nn.Module:
    routed = Routed.trained(model, "lower")
    state = routed.state
    _check(model, scope)
    reasons: dict[str, str | None] = dict.fromkeys((s.name for s in state.sites), "ffn is False")
    if ffn:
        _require_hard(routed)
        check_forwards(model)
        reasons = {s.name: why_not(routed, s) for s in state.sites}
        if scope == "ffn":
            reasons = {s.name: reasons[s.name] or why_not_alone(model, s) for s in state.sites}
    state.notes = [f"{name}: kept masked-dense: {reason}" for name, reason in reasons.items() if reason]
    sites = [s for s in state.sites if not reasons[s.name]]
    if ffn and not sites:
        raise LoweringError("no site can be lowered:\n" + "\n".join(state.notes))
    for site in sites:
        state.strides = lay_out(routed, site) | state.strides  # what the first of those that share a parameter found
    remember_densities(routed)
    with unshared(routed.all_routers()):
        if scope == "ffn":
            _lower_sites(routed, sites)
        else:
            compile_model(model, state, ffn=ffn)
    bypassed = [model.get_submodule(path) for path in _linears_of(sites)]
    left = lower_linear_modules(model, bypassed, quantised_only=scope == "model")
    told = _linears_of(state.sites)  # why an FFN stays as it is says why its linears do
    state.notes += [f"{path}: calls torch's linear: {reason}" for path, reason in left.items() if path not in told]
    state.linears = lowered_linears(model)
    state.lowered = scope
    return model


def _lower_dense(model: nn.Module, scope: Scope) -> None:
    _check(model, scope)
    if is_lowered(model):
        raise LoweredError("the model's linears are lowered already; call ltepass.unlower(model) first")
    if scope == "model":
        compile_model(model, None, ffn=False)
    for path, reason in lower_linear_modules(model, (), quantised_only=scope == "model").items():
        log.info("lower: %s calls torch's linear: %s", path, reason)


def _check(model: nn.Module, scope: Scope) -> None:
    require_whole(model, "lower")
    if scope not in ("ffn", "model"):
        raise ConfigError(f'scope is {scope!r}; expected "ffn" or "model"')


def _require_hard(routed: Routed) -> None:
    soft = [site.name for site, router in routed if router.mode != "hard"]
    if soft:
        raise LoweringError(
            f"{len(soft)} of {len(routed.sites)} routers are in {routed.routers[0].mode!r} mode; lowering expects "
            '"hard"; call ltepass.set_mode(model, "hard")'
        )


def _linears_of(sites: Iterable[FFNSite]) -> set[str]:
    return {path for site in sites for path in (site.up, site.gate, site.down) if path is not None}


def unlower_model(model: nn.Module) -> nn.Module:
    """What `ltepass.unlower` does."""
    root = unwrapped(model)
    if not is_transformed(root) and is_lowered(root):
        all_or_nothing(root, lambda: _unlower_dense(root))
        return model
    return _unlower(model)


def is_lowered(model: nn.Module) -> bool:
    """Whether `lower` changed this very module, dense or transformed."""
    return bool(lowered_linears(model)) or is_compiled(model)


def _unlower_dense(model: nn.Module) -> None:
    unlower_linear_modules(model)
    uncompile_model(model)


@verb
def _unlower(model: nn.Module) -> nn.Module:
    routed = Routed.of(model, "unlower")
    state = routed.state
    if state.lowered is not None:
        require_whole(model, "unlower")
    unlower_linear_modules(model)
    with unshared(routed.all_routers()):
        if state.lowered == "ffn":
            _unlower_sites(routed)
        elif state.lowered == "model":
            uncompile_model(model)
    _give_back_strides(routed)
    state.lowered, state.notes, state.linears = None, [], 0
    return model


def lay_out(routed: Routed, site: FFNSite) -> dict[str, tuple[int, ...]]:
    """Store what the kernel gathers so that it is contiguous: same logical shape, no copy kept.

    That is a neuron; of up and gate an input, where small inputs are left out. Returns the strides that were, by name.
    """
    before = {}
    by_input = routed.router(site).input_cut is not None
    wanted = {site.down_rows: site.down_rows.dim}
    wanted |= {rows: 1 - rows.dim if by_input else rows.dim for rows in (site.up_rows, site.gate_rows) if rows}
    for rows, contiguous_along in wanted.items():
        parameter = routed.model.get_parameter(rows.param)
        if contiguous_along == 1 and parameter.device.type == "cpu" and not parameter.is_meta:
            before[rows.param] = parameter.stride()
            parameter.data = parameter.data.t().contiguous().t()
    return before


def _give_back_strides(routed: Routed) -> None:
    """Of the weights that still lie as `lay_out` stored them: others were replaced meanwhile."""
    parameters = dict(routed.model.named_parameters(remove_duplicate=False))
    for name, stride in routed.state.strides.items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.dim() == 2 and parameter.t().is_contiguous():
            lay_as(parameter, stride)
    routed.state.strides = {}


def lowered_ffn(
    router: Router, up: nn.Module, gate_linear: nn.Module | None, down: nn.Module, x: Tensor, *skipped: nn.Module
) -> Tensor:
    """The whole FFN of a lowered site: x [..., d_model] -> [..., d_model]. skipped: modules that do not run for it."""
    _check_bypassed((up, down) if gate_linear is None else (up, gate_linear, down), skipped)
    gate: tuple[Tensor | None, Tensor | None] = (None, None) if gate_linear is None else parameters_of(gate_linear)
    weights = (*parameters_of(up), *gate, *parameters_of(down))
    for weight in weights:
        if type(weight) is not Parameter and weight is not None and not is_ordinary(weight):
            raise LoweredError(
                f"a weight of a lowered FFN is now a {type(weight).__module__}.{type(weight).__name__}, which the op "
                "does not read; call ltepass.unlower(model) before changing weights, then lower again"
            )
    return lowered_call(router, *weights, x)


def lowered_in_graph(linears: Sequence[nn.Module], skipped: Sequence[nn.Module], router: Router, *args: Any) -> Tensor:
    """As `lowered_call`, where a user's graph called these modules."""
    _check_bypassed(linears, skipped)
    return lowered_call(router, *args)


def _check_bypassed(linears: Iterable[nn.Module], skipped: Iterable[nn.Module]) -> None:
    """Raises LoweredError where something would have run with a call of these, had the op not stood in their place."""
    for module in linears:
        if not plain(module):
            raise _added_later(f"{type(module).__name__} {bypassed_code(module) or not_plain(module) or 'was changed'}")
    for module in skipped:
        if not untouched(module):
            raise _added_later(f"{type(module).__name__} {bypassed_code(module) or 'was changed'}")
    if _has_any_global_hook():
        raise _added_later(GLOBAL_HOOK)


def _added_later(what: str) -> LoweredError:
    return LoweredError(
        f"{what}: it was added after ltepass.lower; call ltepass.unlower(model) before, then lower again"
    )


def lowered_call(
    router: Router,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    """The op on whole parameters, each read as the router's plan says."""
    plan = router.plan
    if router.thread is not None and not torch.compiler.is_compiling():
        require_own(router.thread)
    if not isinstance(plan, Plan):  # unlowered by another thread since this forward began
        raise interfered()
    if router.watched:
        applied()
    f = plan.d_ff
    args = (
        x,
        *router.operands(),
        router._buffers["threshold"],
        _take(plan.up, up, f),
        _take(plan.up_bias, up_bias, f),
        _take(plan.gate, gate, f),
        _take(plan.gate_bias, gate_bias, f),
        down.t() if plan.down_transposed else down,
        down_bias,
        plan.activation,
        *_cuts(router),
    )
    if router.recorder.count_inactive and torch.is_grad_enabled():
        ops = torch.ops.ltepass
        with_mask = ops.routed_proxy_ffn_with_mask if isinstance(router, ProxyRouter) else ops.routed_ffn_with_mask
        y, active, _ = with_mask(*args)
        router.recorder.record((~active).float().mean(-1))
        return y  # type: ignore[no-any-return]
    if isinstance(router, ProxyRouter):
        return routed_proxy_ffn(*args)
    if router.density is not None and x.is_cuda and not torch.compiler.is_compiling():
        with assume_density(router.density):
            return routed_ffn(*args)
    return routed_ffn(*args)


def _cuts(router: Router) -> tuple[Tensor | None, ...]:
    """The op's last arguments, those left away that nobody asked for."""
    cut, input_cut = router._buffers["cut"], router._buffers["input_cut"]
    return (cut, input_cut) if input_cut is not None else () if cut is None else (cut,)


def _take(rows: NeuronRows | None, parameter: Tensor | None, d_ff: int) -> Tensor | None:
    if rows is None or parameter is None:
        return parameter
    taken = rows.take(parameter, d_ff)
    return taken if fits(taken) else taken.contiguous()


def _plan(model: nn.Module, site: FFNSite) -> Plan:
    def partial(rows: NeuronRows | None) -> NeuronRows | None:
        if rows is None:
            return None
        whole = rows.dim == 0 and is_whole(rows.step, model.get_parameter(rows.param).shape[0], site.d_ff)
        return None if whole else rows

    return Plan(
        activation=site.activation,
        d_ff=site.d_ff,
        up=partial(site.up_rows),
        gate=partial(site.gate_rows),
        up_bias=partial(site.up_bias),
        gate_bias=partial(site.gate_bias),
        down_transposed=site.down_rows.dim == 0,
    )


def _lower_sites(routed: Routed, sites: list[FFNSite]) -> None:
    model, state = routed.model, routed.state
    lowered = {s.name for s in sites}
    for site in sites:
        routed.router(site).plan = _plan(model, site)
    aligned = sorted((s for s in state.sites if s.kind == "aligned"), key=lambda s: s.owner)
    for owner, group in groupby(aligned, key=lambda s: s.owner):
        _regenerate(model.get_submodule(owner), list(group), lowered)
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


def _unlower_sites(routed: Routed) -> None:
    model, state = routed.model, routed.state
    for owner, group in groupby(
        sorted((s for s in state.sites if s.kind == "aligned"), key=lambda s: s.owner), key=lambda s: s.owner
    ):
        _regenerate(model.get_submodule(owner), list(group), set())
    for site, router in routed:
        router.plan = None
        if site.kind == "inline":
            for path in {site.up, site.gate or site.up, site.down}:
                model.get_submodule(path).__dict__.pop("forward", None)
            attach(model.get_submodule(site.owner), [inline_site(s) for s in state.sites if s.owner == site.owner])
    if isinstance(model, GraphModule):
        assert state.graph is not None, "lowering kept it"
        model.graph, state.graph = state.graph, None


def _regenerate(owner: nn.Module, sites: list[FFNSite], lowered: set[str]) -> None:
    """The owner's own forward with gates, and with the op where `lowered` names the site; swapped in one step."""
    graphs = trace_owner(owner)
    assert graphs is not None, "an aligned owner was traced before"
    for graph in graphs:
        insert_gates(graph, sites)
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
    x, called = gated.args[2].args[0], _called(graph)
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
    between = with_inner(root, sorted(called - _called(graph) - set(paths)))
    with graph.inserting_before(new):
        skipped = [graph.get_attr(path) for path in between]
    new.args = (linears, skipped, *new.args[2:]) if site.kind == "graph" else (*new.args, *skipped)


def _called(graph: Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes if n.op == "call_module"}


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
        sparse = SparseDown(inline[-1], lowered_ffn, [relative(site, path) for path in idle(model, site)])
        model.get_submodule(site.down).forward = sparse
    attach(module, inline)
