"""One reading of FX graphs from three dialects: torch.export's ATen graph, Dynamo's graph, a user's GraphModule.

Everything here asks "what kind of operation is this node": it never changes a graph. Kinds:
  linear      a product with a weight that is a leaf of the graph (linear, addmm, mm, matmul; a bias may be added apart)
  pointwise   neuron by neuron, token by token (activations, products, casts, dropout)
  movement    the same numbers in another shape (view, chunk, transpose, ...)
  reduction   statistics over a dim (mean, norms, softmax), with which a gate does not commute
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch.fx import GraphModule, Node

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
_IDENTITY = frozenset("alias detach contiguous clone to float half bfloat16 double type_as".split())


def op_name(node: Node) -> str | None:
    """ATen's name of what a node does, whichever dialect it stands in; None for a node that computes nothing."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target: Any = node.target
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


def concrete(size: Any) -> int:
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


def strip_identity(node: Node) -> Node:
    """Go back over nodes that hand a tensor on unchanged (alias, detach, casts, contiguous)."""
    while op_name(node) in _IDENTITY and tensor_inputs(node):
        node = tensor_inputs(node)[0]
    return node


def strip_views(node: Node) -> Node:
    """Go back over identities and over views that keep the last dim (the token dims are folded, not mixed)."""
    while True:
        node = strip_identity(node)
        if op_name(node) not in ("view", "reshape", "flatten", "_unsafe_view", "unsqueeze", "squeeze"):
            return node
        source = tensor_inputs(node)[0]
        if shape(source)[-1:] != shape(node)[-1:]:
            return node
        node = source


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A product with a leaf weight. out_dim: the weight's dim that indexes output features.

    node: whose value is the linear's output: the product itself, or the addition of a bias after it.
    """

    node: Node
    product: Node
    x: Node
    weight: Node
    bias: Node | None
    out_dim: int

    @property
    def width(self) -> int:
        return shape(self.weight)[self.out_dim]

    @property
    def in_width(self) -> int:
        return shape(self.weight)[1 - self.out_dim]


@dataclass(frozen=True)
class Flow:
    """A graph, and which of its nodes are leaf tensors (parameters, buffers, constants) under which name.

    constants: values of the leaves that are literals of the code, by name. identified: what activation.py has learnt.
    """

    gm: GraphModule
    leaves: dict[Node, str]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    identified: dict[str, Any] = field(default_factory=dict)

    def nodes(self) -> Iterator[Node]:
        return iter(self.gm.graph.nodes)

    @cached_property
    def batch(self) -> int:
        """Sequences in the example inputs: the first dim of the first one that has two."""
        inputs = (n for n in self.gm.graph.nodes if n.op == "placeholder" and n not in self.leaves)
        return next((shape(n)[0] for n in inputs if is_plain_tensor(n) and len(shape(n)) > 1), 1)

    @cached_property
    def back(self) -> nx.DiGraph:
        """Edges node -> tensor input, only out of pointwise and movement nodes: where a search for an FFN may go."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.gm.graph.nodes)
        for node in self.gm.graph.nodes:
            if self.linear(node) is None and (is_pointwise(node) or is_movement(node)):
                inputs = [node.args[0]] if is_gate(node) else tensor_inputs(node)
                graph.add_edges_from((node, source) for source in inputs)
        return graph

    @cached_property
    def _made_of(self) -> dict[Node, tuple[bool, bool]]:
        """Whether a node is made of an input, and whether of a parameter: one walk for all nodes."""
        made: dict[Node, tuple[bool, bool]] = {}
        for node in self.gm.graph.nodes:
            before = [made[n] for n in node.all_input_nodes]
            inputs = node.op == "placeholder" or any(of_input for of_input, _ in before)
            made[node] = (False, True) if node in self.leaves else (inputs, any(of_leaf for _, of_leaf in before))
        return made

    def fixed(self, node: Node) -> bool:
        """Whether a node is made of parameters alone, so that it is the same for every input."""
        return self._made_of.get(node) == (False, True)

    def leaf(self, node: Node) -> tuple[Node, bool] | None:
        """(leaf node, transposed) when `node` is a leaf seen through casts and 2-D transposes, else None."""
        transposed = False
        while node not in self.leaves:
            node = strip_identity(node)
            if node in self.leaves:
                break
            if op_name(node) not in ("t", "transpose", "permute", "numpy_T") or len(shape(node)) != 2:
                return None
            node, transposed = tensor_inputs(node)[0], not transposed
        return node, transposed

    def linear(self, node: Node) -> Linear | None:
        """Read a node as a linear, or None. A product whose bias is added apart is read at the addition, not before."""
        biased = self._biased(node)
        if biased is not None:
            return biased
        product = self.product(node)
        if product is not None and product.bias is None:
            users = consumers(node)
            if len(users) == 1 and self._biased(users[0]) is not None:
                return None
        return product

    def product(self, node: Node) -> Linear | None:
        """Read a node as a product with a leaf weight, whatever is added to it later."""
        parts = _linear_parts(node)
        if parts is None:
            return None
        x, weight, bias, out_dim = parts
        leaf = self.leaf(weight) if isinstance(weight, Node) and is_tensor(weight) else None
        if leaf is None or not isinstance(x, Node) or len(shape(leaf[0])) != 2 or self.leaf(x) is not None:
            return None
        return Linear(
            node=node, product=node, x=x, weight=leaf[0], bias=bias, out_dim=1 - out_dim if leaf[1] else out_dim
        )

    def _biased(self, node: Node) -> Linear | None:
        """product(x) + b, where b is a leaf with one entry per output feature and nobody else reads the product."""
        if op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
            return None
        for product, bias in (node.args, node.args[::-1]):
            if not (isinstance(product, Node) and isinstance(bias, Node) and is_tensor(bias)):
                continue
            found = self.product(product)
            if found is None or found.bias is not None or len(consumers(product)) != 1:
                continue
            leaf = self.leaf(bias)
            if leaf is not None and shape(leaf[0]) == (found.width,):
                return replace(found, node=node, bias=bias)
        return None


def _linear_parts(node: Node) -> tuple[Any, Any, Any, int] | None:
    """(x, weight, bias, weight's output dim as written) of the four spellings of a linear."""
    name, kwargs = op_name(node), node.kwargs
    args = list(node.args)
    if name == "linear":
        args += [kwargs.get("weight")] if len(args) < 2 else []
        args += [kwargs.get("bias")] if len(args) < 3 else []
        return args[0], args[1], args[2], 0
    if name == "addmm" and len(args) == 3 and not kwargs:
        return args[1], args[2], args[0], 1
    if name in ("mm", "matmul") and len(args) == 2:
        return args[0], args[1], None, 1
    return None


def consumers(node: Node) -> list[Node]:
    """Users of a node, without the assertions that torch.export leaves behind."""
    return [u for u in node.users if op_name(u) != "_assert_tensor_metadata"]


def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what a node does on other values."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def erase_upstream(node: Node) -> None:
    """Erase an unused node, and then whatever fed only it.

    Not `eliminate_dead_code`: that takes every method call with an unused result for dead, also the in-place update of
    a static key-value cache.
    """
    todo = [node]
    while todo:
        dead = todo.pop()
        if dead.users or dead.op in ("placeholder", "output") or dead._erased:
            continue
        todo += dead.all_input_nodes
        dead.graph.erase_node(dead)
