"""Which linears that are no down projection are worth a line: what stands behind them is nearly an FFN."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import (
    breadth_first,
    consumers,
    is_movement,
    is_nonlinear,
    is_plain_tensor,
    is_pointwise,
    is_reduction,
    numel,
    op_name,
    shape,
    strip_views,
    tensor_inputs,
)

# Both bound the search from one linear, so that the whole costs work in proportion to the graph's size.
MAX_REGION = 64  # nodes; the longest activation in transformers has 14
MAX_SOURCES = 4  # inputs of up linears (two adapted ones have 3); a residual stream soon has more


def without_adapters(flow: Flow, sources: set[Node]) -> set[Node]:
    """Sources that are no linear of another one: an adapter's second linear reads its first one's output."""
    read = {node: linear.x for node in sources if (linear := flow.linear(node)) is not None}
    return {node for node in sources if node not in read or strip_views(read[node]) not in sources}


def is_near(flow: Flow, down: Linear, sources: set[Node], inner: set[Node], check: str) -> bool:
    """Worth a line: up linears of one source and an activation behind this linear, whatever check failed then.

    Everything behind a residual stream has several sources; attention has a product of two computed tensors between.
    """
    if check in ("norm", "elementwise", "size"):
        sources, inner, ended = _relaxed(flow, down)
        if ended:
            return False
    if not 0 < len(sources) <= MAX_SOURCES or not any(_activates(n, down) for n in inner):
        return False
    if check == "one source":
        product = any(op_name(n) == "mul" for n in inner)
        return len(without_adapters(flow, sources)) == 1 or (len(sources) == 2 and product)
    return len(sources) == 1 and (check == "residual width" or down.width == shape(next(iter(sources)))[-1])


def _activates(node: Node, down: Linear) -> bool:
    """An activation of the hidden units, not a step of a statistic over them (the square, the root of an RMS norm)."""
    if not is_nonlinear(node) or not is_plain_tensor(node) or numel(node) < numel(down.x):
        return False
    return not all(is_reduction(u) and is_plain_tensor(u) and numel(u) < numel(node) for u in consumers(node))


def _may_stand(node: Node) -> bool:
    """In what is nearly an FFN: also statistics, and a convolution over tokens (SegFormer's)."""
    return is_pointwise(node) or is_movement(node) or is_reduction(node) or "conv" in (op_name(node) or "")


def _relaxed(flow: Flow, down: Linear) -> tuple[set[Node], set[Node], bool]:
    """The region behind `down` when statistics may stand in it: (sources, inner nodes, ended at something else)."""
    sources: set[Node] = set()
    inner: set[Node] = set()

    def behind(node: Node) -> Iterable[Node]:
        return tensor_inputs(node) if node in inner else ()

    for node in breadth_first(down.x, behind):
        linear = flow.linear(node)
        if node in flow.leaves or not node.all_input_nodes:
            continue
        if linear is not None:
            sources.add(strip_views(linear.x))
        elif _may_stand(node) and len(inner) < MAX_REGION:
            inner.add(node)
        else:
            return sources, inner, True
        if len(sources) > MAX_SOURCES:
            return sources, inner, True
    return sources, inner, False
