"""Checks of one region: whether a gate before the down projection switches a neuron off and nothing else.

Nobody else sees the hidden units, a token's output reads its own input, and what comes out is added, not squashed.
Whoever fails raises MissError, and is worth a line where what stands behind it is nearly an FFN (`is_near`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from ltepass.passes.find.match_types import MissError
from ltepass.passes.find.neuron_rows import indices, per_token
from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import (
    is_movement,
    is_nonlinear,
    is_plain_tensor,
    is_pointwise,
    is_reduction,
    is_tensor,
    numel,
    op_name,
    shape,
    tensor_inputs,
)
from ltepass.passes.graph.run_node import run
from ltepass.passes.graph.walk import breadth_first, consumers, strip_views

# Both bound the search from one linear, so that the whole costs work in proportion to the graph's size.
MAX_REGION = 64  # nodes; the longest activation in transformers has 14
MAX_SOURCES = 4  # inputs of up linears (two adapted ones have 3); a residual stream soon has more
_SQUASH = frozenset("sigmoid tanh softmax exp softplus hardsigmoid relu gelu silu elu log_sigmoid topk".split())
_PASSING = frozenset("to dropout float half bfloat16 type_as".split())


def without_adapters(flow: Flow, sources: set[Node]) -> set[Node]:
    """Sources that are no linear of another one: an adapter's second linear reads its first one's output."""
    read = {node: linear.x for node in sources if (linear := flow.linear(node)) is not None}
    return {node for node in sources if node not in read or strip_views(read[node]) not in sources}


def blocked(node: Node) -> tuple[str, str]:
    """(check, reason) of an operation that a gate before the down projection does not commute with."""
    what = op_name(node) or node.op
    if is_reduction(node):
        return "norm", f"{what} over the hidden units makes each depend on the others: a gate does not commute with it"
    return "elementwise", f"{what} stands between the up and the down projection"


def one_source(flow: Flow, down: Linear, sources: set[Node], inner: Iterable[Node]) -> Node:
    """The input that all up projections of a region read. Raises MissError where there are several."""
    if len(sources) != 1:
        what = ": an adapter adds to one of them" if len(without_adapters(flow, sources)) == 1 else ""
        if not what and _merges(flow, inner):
            what = f" and are added: a merge of several things to width {down.width}, as a link predictor, not an FFN"
        raise MissError(down.node, "one source", f"the up projections read {len(sources)} different inputs{what}")
    (source,) = sources
    return source


def _merges(flow: Flow, inner: Iterable[Node]) -> bool:
    """Whether the outputs of two linears are added, and nothing else is, before the activation."""
    adds = [node for node in inner if op_name(node) == "add"]
    return len(adds) == 1 and all(flow.linear(strip_views(n)) is not None for n in adds[0].all_input_nodes)


def check_private(streams: Sequence[Linear], inner: Sequence[Node], down: Linear) -> None:
    """Permuting neurons is legal only where nothing outside the region sees them."""
    inside = {*inner, down.node, *down.node.all_input_nodes}
    for node in (*(s.node for s in streams), *inner):
        for user in consumers(node):
            if user in inside or not is_tensor(node) or op_name(user) in ("size", "sym_size", "getattr"):
                continue
            statistic = _statistic(user)
            if statistic is not None:
                raise MissError(user, *blocked(statistic))
            raise MissError(user, "private", f"hidden units are also used by {op_name(user) or user.op}")


def _statistic(node: Node) -> Node | None:
    """The reduction that a use of the hidden units leads to within a few steps, or None."""
    for _ in range(4):
        if is_reduction(node):
            return node
        users = consumers(node)
        if len(users) != 1 or not (is_pointwise(node) or is_movement(node)):
            return None
        node = users[0]
    return None


def check_tokens_in(flow: Flow, down: Linear, x: Node) -> None:
    """Each row of x holds the features of one token: not one vector a sequence, not turned so that it mixes tokens."""
    path: list[Node] = []
    node, width = x, shape(x)[-1]
    for _ in range(MAX_REGION):
        if _features_last(flow, node):
            if path and not _keeps_tokens(path[::-1], node):
                raise MissError(down.node, "same token", "its input is transposed: it mixes tokens, not features")
            return
        inputs = [n for n in tensor_inputs(node) if flow.leaf(n) is None]
        if len(inputs) != 1 or not is_plain_tensor(inputs[0]):
            return
        if numel(node) // width == flow.batch < numel(inputs[0]) // width:
            what = f"its input is one vector a sequence ({op_name(node)}): a head or an excitation"
            raise MissError(down.node, "same token", what)
        if not (is_movement(node) or is_pointwise(node)):
            return
        path += [node] if is_movement(node) else []
        node = inputs[0]


def _features_last(flow: Flow, node: Node) -> bool:
    """Whether the node itself says that its last dim is features: linear, embedding, norm, a factor per feature."""
    if flow.linear(node) is not None or op_name(node) in ("embedding", "layer_norm", "rms_norm"):
        return True
    leaves = [seen[0] for n in tensor_inputs(node) if (seen := flow.leaf(n)) is not None]
    return is_pointwise(node) and any(shape(n) == shape(node)[-1:] != (1,) for n in leaves)


def check_output(down: Linear) -> None:
    """An FFN's output is added somewhere; what goes straight into a squashing function is a gate, or a deeper MLP."""
    node = down.node
    for _ in range(8):
        users = [u for u in consumers(node) if op_name(u) not in ("size", "sym_size", "getattr")]
        if len(users) != 1:
            return
        (user,) = users
        if op_name(user) in _SQUASH:
            what = f"its output goes into {op_name(user)}: a gate or a deeper MLP, not an FFN"
            raise MissError(down.node, "output", what)
        if not (is_movement(user) or op_name(user) in _PASSING):
            return
        node = user


def _keeps_tokens(path: Sequence[Node], origin: Node) -> bool:
    """Whether the movements of `path`, in order, keep the features of one token of `origin` [..., width] in one row."""
    current = indices(origin)
    try:
        for node in path:
            (source,) = (n for n in tensor_inputs(node) if is_plain_tensor(n))
            current = run(node, {source: current})
        rows = current.reshape(-1, current.shape[-1]) // shape(origin)[-1]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return per_token(rows)


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
        meet = any(op_name(n) == "mul" for n in inner) or _merges(flow, inner)
        return len(without_adapters(flow, sources)) == 1 or (len(sources) == 2 and meet)
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
