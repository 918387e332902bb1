"""A graph with its leaf tensors by name, and the linears in it: products with a weight that is a leaf (linear, addmm,
mm, matmul; a bias may be added apart). Leaves: what they hold, and new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ltepass.passes.graph.node_kinds import (
    is_gate,
    is_movement,
    is_plain_tensor,
    is_pointwise,
    is_tensor,
    op_name,
    shape,
    tensor_inputs,
    value,
)
from ltepass.passes.graph.walk import consumers, strip_identity


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

    constants: values of the leaves that are literals of the code, by name. identified: of identify_activation.py.
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
        parts = linear_parts(node)
        if parts is None:
            return None
        x, weight, bias, out_dim = parts
        leaf = self.leaf(weight) if isinstance(weight, Node) and is_tensor(weight) else None
        if leaf is None or not isinstance(x, Node) or not isinstance(bias, Node | None):
            return None
        if len(shape(leaf[0])) != 2 or self.leaf(x) is not None:
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


def linear_parts(node: Node) -> tuple[Argument, Argument, Argument, int] | None:
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


def parameters(gm: GraphModule) -> dict[Node, str]:
    """Weights are what Dynamo lifted as parameters or buffers, and a GraphModule's own attributes."""
    leaves = {}
    for node in gm.graph.nodes:
        v = value(node)
        if node.op == "get_attr" and isinstance(v, Tensor):
            leaves[node] = str(node.target)
        elif node.op == "placeholder" and isinstance(v, Tensor) and _lifted(node, v):
            leaves[node] = node.name
    return leaves


def _lifted(node: Node, v: Tensor) -> bool:
    return isinstance(v, torch.nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def held(gm: GraphModule, node: Node) -> Tensor:
    """What a graph's own leaf holds."""
    path, _, attribute = str(node.target).rpartition(".")
    tensor = getattr(gm.get_submodule(path), attribute)
    assert isinstance(tensor, Tensor), f"{node} is a leaf"
    return tensor.detach()
