"""One reading of FX graphs from three dialects: torch.export's ATen graph, Dynamo's graph, a user's GraphModule.

Asks "what kind of operation is this node":
  pointwise   neuron by neuron, token by token (activations, products, casts, dropout)
  movement    the same numbers in another shape (view, chunk, transpose, ...)
  reduction   statistics over a dim (mean, norms, softmax), with which a gate does not commute
What is a linear, a product with a weight of the graph, is asked of the whole graph (`leaves_and_linears.py`).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

# Pointwise in meaning, without the tag in ATen.
_EXTRA_POINTWISE = frozenset(
    "dropout to type_as float half bfloat16 double hardswish hardtanh leaky_relu prelu elu celu where masked_fill "
    "alpha_dropout native_dropout log_sigmoid gate rsub zeros_like ones_like full_like zeros ones full "
    "scalar_tensor".split()
)

_MOVEMENT = frozenset(
    "view reshape _unsafe_view chunk split split_with_sizes slice getitem select narrow unbind unsqueeze squeeze "
    "transpose permute t flatten unflatten expand contiguous clone alias detach movedim swapaxes tensor_split "
    "as_view lift_fresh_copy roll flip numpy_T mT".split()
)

_REDUCTIONS = frozenset(
    "mean sum prod var std var_mean std_mean amax amin max min norm linalg_vector_norm layer_norm native_layer_norm "
    "rms_norm group_norm batch_norm softmax log_softmax logsumexp topk sort kthvalue quantile cumsum".split()
)

# Pointwise, and affine in every input (products of two streams are affine in each): no activation by itself.
_AFFINE = frozenset(
    "add sub mul div neg rsub to float half bfloat16 double type_as dropout alias detach clone contiguous "
    "gate zeros_like ones_like full_like zeros ones full scalar_tensor".split()
)

_SAME = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"}  # Python's own operators

UNKNOWN_SIZE = 5  # stands for a size that depends on data


def op_name(node: Node) -> str | None:
    """ATen's name of what a node does, whichever dialect it stands in; None for a node that computes nothing."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[-1]
        else:
            name = getattr(target, "__name__", "")
    else:
        return None
    name = name.rstrip("_") if not name.startswith("_") else name
    return _SAME.get(name, name)


def value(node: Node) -> Any:
    """The node's example value (fake or real), or None."""
    return node.meta.get("val", node.meta.get("example_value"))


def shape(node: Node) -> tuple[int, ...]:
    """Concrete shape of a node's value; symbolic sizes give their hint."""
    v = value(node)
    assert isinstance(v, torch.Tensor), f"{node} has no tensor value"
    return tuple(concrete(s) for s in v.shape)


def concrete(size: int | torch.SymInt) -> int:
    """A size as an integer: a symbol gives its hint, one that depends on data a made-up value."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return UNKNOWN_SIZE if hint is None else int(hint)


def numel(node: Node) -> int:
    return math.prod(shape(node))


def is_tensor(node: Node) -> bool:
    v = value(node)
    return isinstance(v, torch.Tensor) or (isinstance(v, (tuple, list)) and any(isinstance(t, torch.Tensor) for t in v))


def is_plain_tensor(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_gate(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.ltepass.gate.default


def is_input_cut(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.ltepass.cut_inputs.default


def is_proxy(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.ltepass.proxy_scores.default


def is_tiers(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.ltepass.tiers.default


def is_movement(node: Node) -> bool:
    return op_name(node) in _MOVEMENT


def is_pointwise(node: Node) -> bool:
    name = op_name(node)
    if name is None:
        return False
    if name in _EXTRA_POINTWISE:
        return True
    if name in ("min", "max"):  # of two tensors, or over one
        return len(tensor_inputs(node)) == 2
    packet = getattr(torch.ops.aten, name, None)  # a plain method for a name such as `__eq__`
    if not isinstance(packet, torch._ops.OpOverloadPacket) or (
        node.op == "call_function" and node.target is operator.getitem
    ):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


def is_reduction(node: Node) -> bool:
    return op_name(node) in _REDUCTIONS and not is_pointwise(node)


def is_nonlinear(node: Node) -> bool:
    """A pointwise operation that makes an activation: not merely affine."""
    return is_pointwise(node) and op_name(node) not in _AFFINE


def tensor_inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]
