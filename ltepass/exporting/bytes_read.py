"""What an exported step reads of its weights, in bytes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ltepass.kernels.proxy_codes import Codes
from ltepass.kernels.routed_schema import OPS
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import op_name

GATHERED = ("up", "gate", "down", "up_scale", "gate_scale")  # by neuron
LOW = tuple(f"low_{part}" for part in Codes._fields)  # the same, of the active ones in tiers of bits
KEPT = tuple(f"down_{part}" for part in Codes._fields)  # by those that add anything there


def bytes_read(graph: GraphModule, kept: float = 1.0) -> tuple[int, int]:
    """Bytes of an exported step's weights: of those that a token reads whole, and of those that it reads an active
    neuron at a time.

    kept: in tiers of bits, the share of neurons that add anything; as much of their columns counts with the whole.
    """
    whole, gated = 0, 0
    for leaf in graph.graph.find_nodes(op="get_attr"):
        tensor = held(graph, leaf)
        if any(_takes(user, leaf, GATHERED + LOW) for user in leaf.users):
            gated += tensor.nbytes
        elif any(_takes(user, leaf, KEPT) for user in leaf.users):
            whole += round(kept * tensor.nbytes)
        elif leaf.users:
            row = all((op_name(user) or "").startswith("embedding") for user in leaf.users)  # else it is the head's too
            whole += tensor[0].nbytes if row else tensor.nbytes
    return whole, gated


def _takes(node: Node, leaf: Node, arguments: tuple[str, ...]) -> bool:
    """Whether a sparse op takes the leaf as one of these: rows or columns are read by neuron."""
    if op_name(node) not in {"tiered_ffn", *(op.name for op in OPS)}:
        return False
    assert isinstance(node.target, torch._ops.OpOverload), "one of our ops"
    names = [argument.name for argument in node.target._schema.arguments]
    return any(node.args[names.index(name)] is leaf for name in arguments if name in names)
