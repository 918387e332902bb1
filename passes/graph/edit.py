"""What passes that lower write into a graph: a new leaf, a transposed view; and what nobody reads any more goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ltepass.passes.graph.node_kinds import op_name, value

T = TypeVar("T")


def once_a_tensor(make: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """`make`, called once for a tensor whatever its names: leaves that share one share what is made of it."""
    made: dict[tuple[int, tuple[int, ...], tuple[int, ...]], T] = {}

    def call(tensor: Tensor) -> T:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in made:
            made[key] = make(tensor)
        return made[key]

    return call


def add_leaf(gm: GraphModule, name: str, tensor: Tensor) -> Node:
    """Write a new buffer of the graph's module and the node that reads it, where nodes are being inserted."""
    gm.register_buffer(name, tensor)
    node = gm.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def drop_unread(gm: GraphModule) -> None:
    """What changes nothing and nobody reads, and then the module's buffers that no node reads."""
    for node in reversed(gm.graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            gm.graph.erase_node(node)
    read = {str(leaf.target) for leaf in gm.graph.find_nodes(op="get_attr")}
    for name, _ in list(gm.named_buffers(remove_duplicate=False)):
        if name not in read:
            path, _, attribute = name.rpartition(".")
            delattr(gm.get_submodule(path), attribute)
    gm.recompile()


def transposed(gm: GraphModule, leaf: Node) -> Node:
    """A weight's transposed view, written where nodes are being inserted."""
    new = gm.graph.call_function(torch.ops.aten.t.default, (leaf,))
    new.meta["example_value"] = value(leaf).t()
    return new


def erase_upstream(node: Node) -> None:
    """Erase an unused node, and then whatever fed only it.

    Not `eliminate_dead_code`: that takes every method call with an unused result for dead, also the in-place update of
    a static key-value cache.
    """
    todo = [node]
    while todo:
        dead = todo.pop()
        if all(op_name(user) == "_assert_tensor_metadata" for user in dead.users):  # of an export
            for check in list(dead.users):
                dead.graph.erase_node(check)
        if dead.users or dead.op in ("placeholder", "output") or dead._erased:
            continue
        todo += dead.all_input_nodes
        dead.graph.erase_node(dead)
