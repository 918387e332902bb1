"""What a lowered FFN runs: the op in the place of its linears, and the checks that nothing was added to them since.

Regenerated forwards, hooks and graphs call these functions, and pickles name them: one that moves leaves its module's
old name in `ltepass/old_names.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ltepass.errors import LoweredError
from ltepass.kernels.dispatch import Args
from ltepass.kernels.gpu.which_path import assume_density
from ltepass.kernels.packed_tiers import packed_tiered_ffn
from ltepass.kernels.routed_ffn import routed_ffn, routed_proxy_ffn
from ltepass.kernels.routed_schema import RoutedOp, op_in_codes
from ltepass.kernels.tiers import tiered_ffn
from ltepass.kernels.weight_formats import SparseFormat
from ltepass.passes.lower.bypassed_modules import Settings, check_bypassed
from ltepass.passes.lower.why_not_linear import parameters_of
from ltepass.routed.gate import applied
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, NeuronRows, is_ordinary
from ltepass.routed.tiered_router import TieredRouter
from ltepass.threads import interfered, require_own


@dataclass(frozen=True)
class Plan:
    """How one site's weights are read by the op. Rows are None where the whole parameter is the operand.

    skipped: the modules that do not run for it, and the values that nobody reads, in the order in which they are handed
    on: who finds others there raises. settings: what each of them held then.
    """

    activation: str
    d_ff: int
    up: NeuronRows | None
    gate: NeuronRows | None
    up_bias: NeuronRows | None
    gate_bias: NeuronRows | None
    down_transposed: bool
    skipped: tuple[object, ...] = field(default=(), repr=False, compare=False)
    settings: tuple[Settings, ...] = field(default=(), repr=False, compare=False)


def plan_of(model: nn.Module, site: FFNSite) -> Plan:
    """How a lowered forward of this site is to read its weights."""

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


def lowered_ffn(
    router: Router, up: nn.Module, gate_linear: nn.Module | None, down: nn.Module, x: Tensor, *skipped: object
) -> Tensor:
    """The whole FFN of a lowered site: x [..., d_model] -> [..., d_out]. skipped: as the plan's, now."""
    check_bypassed((up, down) if gate_linear is None else (up, gate_linear, down), skipped, *_noted(router))
    gate: tuple[Tensor | None, Tensor | None] = (None, None) if gate_linear is None else parameters_of(gate_linear)
    weights = (*parameters_of(up), *gate, *parameters_of(down))
    for weight in weights if router.coded is None else ():  # whose codes know their source
        if type(weight) is not Parameter and weight is not None and not is_ordinary(weight):
            raise LoweredError(
                f"a weight of a lowered FFN is now a {type(weight).__module__}.{type(weight).__name__}, which the op "
                "does not read; call ltepass.unlower(model) before changing weights, then lower again"
            )
    return lowered_call(router, *weights, x)


def lowered_in_graph(linears: Sequence[nn.Module], skipped: Sequence[object], router: Router, *args: Any) -> Tensor:
    """As `lowered_call`, where a user's graph called these modules."""
    x: Tensor = args[-1]
    if isinstance(x, torch.fx.Proxy):  # as for `gate`: one node stays one node when a pickle loads
        return x.tracer.create_proxy("call_function", lowered_in_graph, (linears, skipped, router, *args), {})
    check_bypassed(linears, skipped, *_noted(router))
    return lowered_call(router, *args)


def _noted(router: Router) -> tuple[tuple[object, ...], tuple[Settings, ...]]:
    """What was skipped, and its settings; a plan of an older pickle holds neither."""
    plan = router.plan
    return (plan.skipped, plan.settings) if isinstance(plan, Plan) else ((), ())


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
    coded, plan = router.coded, router.plan  # both before it is asked whether a call exchanges them now
    require_own(router)
    if not isinstance(plan, Plan):  # unlowered by another thread since this forward began
        raise interfered()
    if router.watched:
        applied()
    if isinstance(router, TieredRouter):
        if router.packed_once is None or torch.compiler.is_compiling():  # a graph reads planes that may change
            return tiered_ffn(x, *router.tiers(), down_bias, plan.activation)
        return packed_tiered_ffn(x, *router.packed_tiers(), down_bias, plan.activation)
    f = plan.d_ff
    biases = (_take(plan.up_bias, up_bias, f), _take(plan.gate_bias, gate_bias, f), down_bias)
    weights: tuple[Tensor | None, ...]
    if coded is not None:
        coded.require_sources(up, gate, down, router)
        weights = coded.weights(*biases)
    else:
        taken = (_take(plan.up, up, f), _take(plan.gate, gate, f), down.t() if plan.down_transposed else down)
        weights = tuple(t for pair in zip(taken, biases, strict=True) for t in pair)
    args = (x, *router.operands(), router._buffers["threshold"], *weights, plan.activation, *_cuts(router))
    if coded is not None:
        return _in_codes(router, coded.format, args)
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


def _in_codes(router: Router, format: SparseFormat, args: Args) -> Tensor:
    op = op_in_codes(format, proxied=isinstance(router, ProxyRouter))
    if router.recorder.count_inactive and torch.is_grad_enabled():
        router.recorder.record((~op.mask(op.checked(args))).float().mean(-1))
    return call_in_codes(op, args)


def call_in_codes(op: RoutedOp, args: Args) -> Tensor:
    return getattr(torch.ops.ltepass, op.name)(*args)  # type: ignore[no-any-return]


def _cuts(router: Router) -> tuple[Tensor | None, ...]:
    """The op's last arguments, those left away that nobody asked for."""
    cut, input_cut = router._buffers["cut"], router._buffers["input_cut"]
    return (cut, input_cut) if input_cut is not None else () if cut is None else (cut,)


def _take(rows: NeuronRows | None, parameter: Tensor | None, d_ff: int) -> Tensor | None:
    """What a lowered FFN hands to the op: a parameter, a view of its rows, or a copy where it takes no such view."""
    if rows is None or parameter is None:
        return parameter
    taken = rows.take(parameter, d_ff)
    return taken if fits(taken) else taken.contiguous()


def is_whole(step: int, length: int, d_ff: int) -> bool:
    """Whether a parameter of this length along its neurons is the operand as it stands."""
    return step == 1 and length == d_ff


def fits(view: Tensor) -> bool:
    """Whether the op takes this view of a parameter, else a copy of it: strided rows it does, and no strided bias."""
    return view.dim() != 1 or view.is_contiguous()
