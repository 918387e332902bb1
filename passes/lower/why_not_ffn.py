"""Which sites the op may stand for: what would not run then, and what the op does not read.

What holds of a site holds of its region in Dynamo's graph too, and is said in the same words.
Of a site it is asked twice: before lowering, where the answer is a note; and at every call of a lowered site, where it
is an error.
"""

from __future__ import annotations

from torch import nn
from torch.fx import Node
from torch.nn.modules.module import _has_any_global_hook

from ltepass.kernels.weight_formats import SparseFormat
from ltepass.passes.capture.guard_replaced_forwards import is_replaced
from ltepass.passes.find.match import Region, down_rows
from ltepass.passes.graph.node_kinds import is_input_cut, is_plain_tensor, shape, value
from ltepass.passes.graph.walk import strip_views
from ltepass.passes.lower.bypassed_modules import GLOBAL_HOOK, bypassed_code, called_modules, idle
from ltepass.passes.lower.why_not_linear import (
    is_product,
    not_plain,
    parameters_of,
    why_not_by_neuron,
    why_not_linear,
)
from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite, find_parameter, is_ordinary
from ltepass.routed.torchao_weights import holds_codes, holds_int8

TIERS_ON_GPU = "tiers of bits have no kernel for GPUs yet"
SMALL_INPUTS_ON_GPU = "small inputs are left out, which no GPU kernel does"


def unknown_activation(activation: str) -> str:
    return f"no kernel knows its activation {activation}"


def also_scales(parameter: str) -> str:
    return f"{parameter} also scales its neurons"


def why_not(routed: Routed, site: FFNSite, format: SparseFormat | None = None) -> str | None:
    """Why a site stays masked-dense, or None where the op computes just what the site computes. format: of the weights
    that the op reads, which are torchao's or become codes; None: floats.
    """
    model, router = routed.model, routed.router(site)
    if router.tiered and router.weight.is_cuda:
        return TIERS_ON_GPU
    if site.activation.startswith("custom"):
        return unknown_activation(site.activation)
    rows = {site.up_rows, site.gate_rows, site.up_bias, site.gate_bias, site.down_rows}
    if router.input_cut is not None and router.weight.is_cuda:
        return SMALL_INPUTS_ON_GPU
    extra = [r.param for r in site.neurons if r not in rows]
    if extra:
        return also_scales(extra[0])
    for rows_of, path in ((site.up_bias, site.up), (site.gate_bias, site.gate)):
        if rows_of is None or path is None or site.kind == "graph":
            continue
        if not _has_bias(model, path, rows_of.param):
            return f"{rows_of.param} is added apart from {path}"
    linears = dict.fromkeys(p for p in (site.up, site.gate, site.down) if p is not None)
    for path in linears:
        if site.kind == "graph" and path not in called_modules(model):
            continue  # the graph itself holds the product
        by_neuron = path == site.down
        reason = _why_not_read(model.get_submodule(path), None if router.tiered else format, by_neuron=by_neuron)
        if reason is not None:
            return f"{path} {reason}"
    return _why_not_held(model, site)


def _why_not_read(linear: nn.Module, format: SparseFormat | None, *, by_neuron: bool) -> str | None:
    """by_neuron: whether the op gathers its columns."""
    reason = not_plain(linear)
    if reason is None or not is_product(linear):
        return reason
    weight, bias = parameters_of(linear)
    if not holds_codes(weight):
        return reason
    held: SparseFormat = "int8" if holds_int8(weight) else "int4"
    if by_neuron and held == "int4":
        left = why_not_by_neuron(weight) or (None if bias is None or is_ordinary(bias) else "its bias is no tensor")
    else:
        left = why_not_linear(linear)
    if left is not None:
        return f"is left in {held}: {left}"
    return None if format == held else f'{reason}; lower(linears="{held}") reads it'


def why_not_region(region: Region, scored: Node | None, soft: bool) -> str | None:
    """Why a region in Dynamo's graph stays masked-dense, or None; scored: what its router reads, None where nothing
    known decides.
    """
    standard = {region.up.rows, region.up.bias, down_rows(region.down)}
    standard |= {region.gate.rows, region.gate.bias} if region.gate else set()
    x, source = region.up.linear.x, region.x
    if is_input_cut(source):
        source = strip_views(source.args[0])  # type: ignore[arg-type]
        if value(x).device.type != "cpu":
            return SMALL_INPUTS_ON_GPU
    if soft:
        return "a soft gate: every expert is active"
    if not region.lowerable:
        return unknown_activation(region.activation)
    extra = [r.leaf.name for r in region.neurons if r not in standard]
    if extra:
        return also_scales(extra[0])
    if scored is None or strip_views(scored) is not source:
        return "the gate's scores are no linear of the FFN's input, and no proxy's"
    if region.x is not strip_views(x) or value(region.x).dtype != value(x).dtype:
        return "the router and the up projection read different dtypes"
    inner = [value(n) for n in region.inner if is_plain_tensor(n)]
    if any(v.is_floating_point() and v.dtype != value(x).dtype for v in inner):
        return "a cast inside the region"
    if shape(x)[:-1] != shape(region.down.node)[:-1]:
        return "the region changes the token dims"
    return None


def _why_not_held(model: nn.Module, site: FFNSite) -> str | None:
    """Whether the linears hold the weights that transform found there, and all of them."""
    for rows in (r for r in (site.up_rows, site.gate_rows, site.down_rows) if r is not None):
        last, held = rows.start + (site.d_ff - 1) * rows.step, find_parameter(model, rows.param)
        if held is None:
            return f"{rows.param} is no parameter any more: the weight is computed"
        if last >= held.shape[rows.dim]:
            return f"{rows.param} holds a part of the neurons here: the model is split over devices"
    return None


def why_not_alone(model: nn.Module, site: FFNSite) -> str | None:
    """Why a site may not call the op by itself; where Dynamo traces the model, its graph says what hooks do."""
    if _has_any_global_hook():
        return GLOBAL_HOOK
    paths = [p for p in (site.up, site.gate, site.down) if p is not None]
    if site.kind == "graph":
        paths = [p for p in paths if p in called_modules(model)]
    elif is_replaced(model.get_submodule(site.owner)):
        return f"{site.owner} runs a forward that was put on the instance"
    reasons = ((path, bypassed_code(model.get_submodule(path))) for path in dict.fromkeys(paths + idle(model, site)))
    return next((f"{path} {reason}" for path, reason in reasons if reason is not None), None)


def _has_bias(model: nn.Module, path: str, name: str) -> bool:
    """Whether the linear at `path` adds this parameter itself, also where another module shares it and names it."""
    if name.rpartition(".")[0] == path:
        return True
    own = model.get_submodule(path)._parameters.get("bias")
    return own is not None and any(p is own for n, p in model.named_parameters(remove_duplicate=False) if n == name)
