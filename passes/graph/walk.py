"""From a node to others: back over casts and views, on to its users, breadth first, and up from a dead one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from torch.fx import Node

from ltepass.passes.graph.node_kinds import op_name, shape, tensor_inputs

_IDENTITY = frozenset("alias detach contiguous clone to float half bfloat16 double type_as".split())


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


def consumers(node: Node) -> list[Node]:
    """Users of a node, without the assertions that torch.export leaves behind."""
    return [u for u in node.users if op_name(u) != "_assert_tensor_metadata"]


def breadth_first(start: Node, behind: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """Nodes from `start` back; `behind` is asked after the node was handed out."""
    seen, queue = {start}, deque([start])
    while queue:
        node = queue.popleft()
        yield node
        for source in behind(node):
            if source not in seen:
                seen.add(source)
                queue.append(source)


def upstream(node: Node, stop: Iterable[Node]) -> set[Node]:
    """Every node that `node` is computed from, up to the nodes of `stop`."""
    ends = set(stop) - {node}
    return set(breadth_first(node, lambda n: () if n in ends else n.all_input_nodes)) - {node}
