"""What an exported step reads of its weights, in bytes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ltepass.kernels.routed_schema import OPS
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import op_name

GATHERED = ("up", "gate", "down", "up_scale", "gate_scale")  # by neuron


def bytes_read(graph: GraphModule) -> tuple[int, int]:
    """Bytes of an exported step's weights: of those that a token reads whole, and of those that it reads an active
    neuron at a time.
    """
    whole, gated = 0, 0
    for leaf in graph.graph.find_nodes(op="get_attr"):
        tensor = held(graph, leaf)
        if any(_gathers(user, leaf) for user in leaf.users):
            gated += tensor.nbytes
        elif leaf.users:
            row = all((op_name(user) or "").startswith("embedding") for user in leaf.users)  # else it is the head's too
            whole += tensor[0].nbytes if row else tensor.nbytes
    return whole, gated


def _gathers(node: Node, leaf: Node) -> bool:
    """Whether a sparse op reads those rows or columns of the leaf whose neurons are active."""
    if op_name(node) not in {op.name for op in OPS}:
        return False
    assert isinstance(node.target, torch._ops.OpOverload), "one of our ops"
    names = [argument.name for argument in node.target._schema.arguments]
    return any(node.args[names.index(name)] is leaf for name in GATHERED if name in names)
