"""Which linears the ops may stand for, as modules and as nodes of a graph; the others have a reason each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from ltepass.kernels.linear import FLOATS
from ltepass.kernels.weight_formats import BLOCK
from ltepass.passes.capture.guard_replaced_forwards import is_replaced
from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import is_gate, shape, tensor_inputs, value
from ltepass.passes.graph.walk import strip_identity
from ltepass.routed.sites import is_ordinary
from ltepass.routed.torchao_weights import has_blocks_by_input, int8_parts


def not_plain(module: nn.Module) -> str | None:
    """What makes a linear's forward more than the matrix product with tensors of torch's own; None for a plain one."""
    if "_hf_hook" in module.__dict__:
        return "carries an offload hook, which the op would bypass"
    if not is_product(module):
        return f"is a {type(module).__module__}.{type(module).__name__}, not a plain linear"
    for tensor in parameters_of(module):
        if tensor is not None and not is_ordinary(tensor):
            return f"holds a {type(tensor).__module__}.{type(tensor).__name__}, which the op does not read"
    return None


def is_product(module: nn.Module) -> bool:
    """A linear whose forward is the matrix product and nothing else: no subclass."""
    cls = type(module)
    return cls is nn.Linear or is_conv1d(module) or f"{cls.__module__}.{cls.__name__}" in _SAME_AS_LINEAR


# Subclasses of nn.Linear whose forward is the same product spelled out.
_SAME_AS_LINEAR = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


def is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def parameters_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a linear, without nn.Module.__getattr__, which costs more than a small FFN's call."""
    own = linear._parameters
    weight = own.get("weight")
    if weight is None:  # a DataParallel replica keeps plain tensors as attributes
        return linear.weight, linear.bias  # type: ignore[return-value]
    return weight, own.get("bias")


def why_not_linear(module: nn.Module) -> str | None:
    """Why a linear on the CPU keeps its own forward, or None."""
    weight, bias = parameters_of(module)
    if "_hf_hook" in module.__dict__:
        return "it carries an offload hook"
    if "forward" in module.__dict__ and is_replaced(module):
        return "it runs a forward that was put on the instance"
    if bias is not None and not is_ordinary(bias) and not is_ordinary(weight):
        return f"its bias is a {type(bias).__name__}"
    return why_not_weight(weight)


def why_not_weight(weight: Tensor) -> str | None:
    """Why no op of linears reads a weight, or None."""
    if is_ordinary(weight):
        return None if weight.dtype in FLOATS else f"no kernel for {str(weight.dtype).removeprefix('torch.')}"
    reader = {"Int8Tensor": _why_not_int8, "IntxUnpackedToInt8Tensor": _why_not_int4}.get(kind(weight))
    return f"its weight is a {type(weight).__module__}.{kind(weight)}" if reader is None else reader(weight)


def kind(weight: Tensor) -> str:
    return type(weight).__name__


def _why_not_int8(weight: Tensor) -> str | None:
    """Of torchao's Int8Tensor: codes and scales as linear_int8 has them."""
    codes, scale = int8_parts(weight)
    if codes.dim() != 2 or scale.shape != codes.shape[:1]:
        return f"its {list(codes.shape)} codes have {scale.numel()} scales; expected one an output"
    return _why_not_codes(weight)  # -128 too: no path of the kernel saturates


def _why_not_int4(weight: Tensor) -> str | None:
    """Of torchao's IntxUnpackedToInt8Tensor: codes and scales as linear_int4 has them."""
    codes, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    if codes.dim() != 2 or scale.shape != (codes.shape[0], codes.shape[1] / BLOCK):
        return f"its {list(codes.shape)} codes have {list(scale.shape)} scales; expected one for each {BLOCK} inputs"
    return why_not_4_bits(weight)


def why_not_held(weight: Tensor) -> str | None:
    """Why no op at all reads a weight of torchao's in 4 bits, or None."""
    return why_not_4_bits(weight) if has_blocks_by_input(weight) else why_not_weight(weight)


def why_not_by_neuron(weight: Tensor) -> str | None:
    """Why no sparse op reads a down projection of 4 bits, or None."""
    if not has_blocks_by_input(weight):
        return "blocks of its codes lie across neurons; ltepass.quantize of the transformed model lays them along each"
    return why_not_4_bits(weight)


def why_not_4_bits(weight: Tensor) -> str | None:
    """What a weight of torchao's may hold, wherever its blocks lie, that no op computes with; None if nothing."""
    codes, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    if not bool(((codes >= -8) & (codes <= 7)).all()):
        return "its codes have more than 4 bits"
    if not bool(scale.to(torch.float16).isfinite().all()):
        return "its scales are no float16"
    return _why_not_codes(weight)


def _why_not_codes(weight: Tensor) -> str | None:
    """Of both kinds of torchao's tensors: what they may hold that no op of ours computes with."""
    if getattr(weight, "act_pre_scale", None) is not None:
        return "its inputs are scaled first"
    zero = getattr(weight, "zero_point", None)
    if zero is not None and bool(zero.any()):
        return "its codes have a zero point"
    return None


def why_not_node(flow: Flow, linear: Linear) -> str | None:
    """Why a linear in a graph stays as it is, or None."""
    tensors = [value(n) for n in (linear.x, linear.weight, linear.node, linear.bias) if n is not None]
    if not all(isinstance(t, Tensor) and is_ordinary(t) for t in tensors):
        return "a tensor of another class"
    if any(t.device.type != "cpu" for t in tensors):
        return "not on the CPU"
    if tensors[0].dtype not in FLOATS or any(t.dtype != tensors[0].dtype for t in tensors):
        return "operands of several dtypes, or of one that the op does not read"
    if _reads_weight_through_cast(flow, linear):
        return "a weight that is cast there and back"
    if value(linear.weight).stride(1 - linear.out_dim) != 1:
        return "a weight stored [d_in, d_out]"
    if linear.bias is not None and shape(linear.bias) != (linear.width,):
        return "a bias that is not one number an output"
    return None


def read_linears(flow: Flow) -> list[tuple[Linear, str | None]]:
    """A graph's linears in order, each with the reason why the op does not stand for it, or None."""
    scores = {strip_identity(n.args[1]) for n in flow.nodes() if is_gate(n) and isinstance(n.args[1], Node)}
    found = [linear for linear in map(flow.linear, list(flow.nodes())) if linear is not None]
    return [(x, "gives a gate its scores" if x.node in scores else why_not_node(flow, x)) for x in found]


def _reads_weight_through_cast(flow: Flow, linear: Linear) -> bool:
    """Whether the weight is rounded between the leaf and the product, which reads it through casts."""
    dtype = value(linear.weight).dtype
    node = next(n for n in linear.product.all_input_nodes if (flow.leaf(n) or (None,))[0] is linear.weight)
    while node not in flow.leaves:
        if value(node).dtype != dtype:
            return True
        node = tensor_inputs(node)[0]
    return False
