"""Leaves of a graph: the weights that it reads, what they hold, and new ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ltepass.passes.graph.node_kinds import value


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


def add_leaf(gm: GraphModule, name: str, tensor: Tensor) -> Node:
    """A new buffer of the graph's module, and the node that reads it, where nodes are being inserted."""
    gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def transposed(gm: GraphModule, leaf: Node) -> Node:
    """Its transposed view, where nodes are being inserted."""
    new = gm.graph.call_function(torch.ops.aten.t.default, (leaf,))
    new.meta["example_value"] = value(leaf).t()
    return new
