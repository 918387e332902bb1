"""Stacks of expert FFNs: weights [n_experts, ...] that a model's own router picks from. Found in order to be refused.

A product is known as one of a stack by its weight: a 3-D leaf, seen through movement, casts and indexing. Two of them
with elementwise operations between are an expert FFN. Gating neurons inside experts is not built: the model's router
already chooses, and the sparse op takes one matrix, not a stack.
"""

from __future__ import annotations

from collections import deque

from torch.fx import Node

from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Flow
from ltepass.passes.graph.node_kinds import (
    is_movement,
    is_nonlinear,
    is_plain_tensor,
    is_pointwise,
    op_name,
    shape,
    tensor_inputs,
)
from ltepass.passes.graph.walk import strip_identity
from ltepass.routed.sites import Refusal

_INDEXING = frozenset("index index_select gather embedding take_along_dim".split())
_JOINING = frozenset("cat stack index_add index_put scatter scatter_add".split())  # of one expert's tokens to all's
MAX_STEPS = 64


def refuse_expert_stacks(captured: Captured) -> list[Refusal]:
    """For every stack of expert FFNs of a graph, one per pair of weights."""
    flow = captured.flow
    products = _stacked_products(flow)
    found: dict[tuple[str, str], tuple[Node, int]] = {}
    for node, (leaf, n_experts) in products.items():
        up = _product_behind(node, products)
        if up is not None:
            found.setdefault((flow.leaves[products[up][0]], flow.leaves[leaf]), (node, n_experts))
    return [
        Refusal(
            module=captured.stack(node)[-1],
            node=node.name,
            check="experts",
            reason=f"a stack of {n_experts} experts behind the model's own router; the sparse op takes no stack",
            nearest=f"{up}, {down}",
        )
        for (up, down), (node, n_experts) in found.items()
    ]


def _stacked_products(flow: Flow) -> dict[Node, tuple[Node, int]]:
    """Product node -> (leaf that its weight is taken from, experts in the stack)."""
    products: dict[Node, tuple[Node, int]] = {}
    for leaf in flow.leaves:
        if not is_plain_tensor(leaf) or len(shape(leaf)) not in (2, 3):
            continue
        seen = {leaf: _stacked(leaf)}
        queue = deque([leaf])
        while queue:
            source = queue.popleft()
            for user in source.users:
                if _passes_weight(user) and user not in seen:
                    seen[user] = seen[source] or _stacked(user)
                    queue.append(user)
                elif seen[source] and is_product(user):
                    products[user] = (leaf, seen[source])
    return products


def _passes_weight(node: Node) -> bool:
    return is_movement(node) or op_name(node) in _INDEXING or strip_identity(node) is not node


def _stacked(node: Node) -> int:
    """Size of the stack's dim when a weight has three, else 0."""
    return shape(node)[0] if is_plain_tensor(node) and len(shape(node)) == 3 else 0


def is_product(node: Node) -> bool:
    name = op_name(node) or ""
    return any(part in name for part in ("mm", "matmul", "linear", "einsum"))


def _product_behind(node: Node, products: dict[Node, tuple[Node, int]]) -> Node | None:
    """The stacked product that feeds `node` through elementwise operations with an activation among them, or None."""
    up, nonlinear = None, False
    queue = deque(tensor_inputs(node))
    seen = set(queue)
    while queue and len(seen) < MAX_STEPS:
        source = queue.popleft()
        if source in products:
            up = up or source
        elif is_pointwise(source) or is_movement(source) or op_name(source) in _INDEXING | _JOINING:
            nonlinear |= is_nonlinear(source)
            fresh = [n for n in tensor_inputs(source) if n not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return up if nonlinear else None
