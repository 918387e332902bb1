"""Match one FFN region, and learn what it computes by running it on other values, never by names.

The region lies between one or more "streams" (outputs of up linears) and the input of the down linear. It runs twice:
  on index tensors (neuron_rows.py), which tells neuron i's row of every parameter and that no two tokens are mixed;
  on sample values (activation.py), which tells the activation (compared with every function that a kernel knows).
The checks around it ask whether a gate before the down projection switches a neuron off and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from ltepass.passes.find.activation import identify
from ltepass.passes.find.match_types import Miss, MissError, Piece, Rows
from ltepass.passes.find.near_miss import MAX_REGION, MAX_SOURCES, is_near, without_adapters
from ltepass.passes.find.neuron_rows import keeps_tokens, trace_rows
from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import (
    breadth_first,
    consumers,
    is_gate,
    is_movement,
    is_plain_tensor,
    is_pointwise,
    is_reduction,
    is_tensor,
    numel,
    op_name,
    shape,
    strip_views,
    tensor_inputs,
)

__all__ = ["Miss", "Piece", "Region", "Rows", "down_rows", "match_down"]

_SQUASH = frozenset("sigmoid tanh softmax exp softplus hardsigmoid relu gelu silu elu log_sigmoid topk".split())
_PASSING = frozenset("to dropout float half bfloat16 type_as".split())


@dataclass(frozen=True, kw_only=True)
class Region:
    """An FFN: x -> streams -> inner -> down.

    up, gate: pieces with h = act(gate) * up, or h = act(up) where gate is None.
    activation: a name in kernels.reference.ACTIVATIONS, or "custom(<ops>)".
    neurons: every leaf slice that has one entry per neuron.
    """

    x: Node
    up: Piece
    gate: Piece | None
    inner: tuple[Node, ...]
    gate_op: Node | None
    down: Linear
    activation: str
    d_ff: int
    neurons: tuple[Rows, ...]

    @property
    def lowerable(self) -> bool:
        return not self.activation.startswith("custom")


@dataclass
class _Walk:
    """What lies behind a down projection. sources: inputs of the streams. scales: one factor a token, from outside."""

    streams: list[Linear] = field(default_factory=list)
    sources: set[Node] = field(default_factory=set)
    leaves: list[Node] = field(default_factory=list)
    scales: list[Node] = field(default_factory=list)
    inner: set[Node] = field(default_factory=set)
    gates: list[Node] = field(default_factory=list)


def down_rows(down: Linear) -> Rows:
    return Rows(leaf=down.weight, dim=1 - down.out_dim, start=0, step=1)


def match_down(flow: Flow, down: Linear) -> Region | Miss:
    """Match the FFN whose down projection is `down`."""
    walk = _Walk()
    try:
        _walk_back(flow, down, walk)
        return _match(flow, down, walk)
    except MissError as e:
        seen = ", ".join(dict.fromkeys(op_name(n) or "" for n in sorted(walk.inner)))
        return Miss(
            node=e.node,
            check=e.check,
            reason=e.reason,
            near=is_near(flow, down, walk.sources, walk.inner, e.check),
            nearest=seen,
            gate_op=next(iter(walk.gates), None),
        )


def _walk_back(flow: Flow, down: Linear, walk: _Walk) -> None:
    """Collect the region behind `down`, nearest first; ends at linears, leaves and scales, misses at anything else."""
    tokens = numel(down.x) // down.in_width
    for node in breadth_first(down.x, lambda n: flow.back.successors(n) if n in walk.inner else ()):
        if node in flow.leaves:
            walk.leaves.append(node)
        elif is_plain_tensor(node) and numel(node) <= tokens < numel(down.x) and not flow.fixed(node):
            walk.scales.append(node)  # so few numbers made of the input: one a token, which trace_rows checks
        elif (linear := flow.linear(node)) is not None:
            walk.streams.append(linear)
            walk.sources.add(strip_views(linear.x))
        elif is_pointwise(node) or is_movement(node):
            walk.inner.add(node)
            walk.gates += [node] if is_gate(node) else []
        else:
            raise MissError(node, *_blocked(node))
        if len(walk.sources) > MAX_SOURCES:
            raise MissError(
                down.node, "one source", f"the up projections read more than {MAX_SOURCES} different inputs"
            )
        if len(walk.inner) > MAX_REGION:
            raise MissError(node, "size", f"more than {MAX_REGION} elementwise operations before the down projection")


def _blocked(node: Node) -> tuple[str, str]:
    what = op_name(node) or node.op
    if is_reduction(node):
        return "norm", f"{what} over the hidden units makes each depend on the others: a gate does not commute with it"
    return "elementwise", f"{what} stands between the up and the down projection"


def _match(flow: Flow, down: Linear, walk: _Walk) -> Region:
    if not walk.streams:
        raise MissError(down.node, "up", "no linear feeds this one through elementwise operations")
    if not any(is_pointwise(n) and op_name(n) not in ("to", "dropout") for n in walk.inner):
        raise MissError(down.node, "activation", "two linears with no activation between them: a low-rank pair")
    x = _one_source(flow, down, walk.sources)
    inner = tuple(sorted(walk.inner))
    _check_private(walk, inner, down)
    pieces, neurons = trace_rows(flow, down, walk.streams, walk.leaves, walk.scales, inner)
    if down.width != shape(x)[-1]:
        raise MissError(
            down.node, "residual width", f"maps width {shape(x)[-1]} to {down.width}: a head or an adapter, not an FFN"
        )
    _check_tokens_in(flow, down, x)
    _check_output(down)
    pieces, activation = identify(flow, down, pieces, inner, walk.leaves, walk.scales)
    return Region(
        x=x,
        up=pieces[-1],
        gate=pieces[0] if len(pieces) == 2 else None,
        inner=inner,
        gate_op=walk.gates[0] if walk.gates else None,
        down=down,
        activation=activation,
        d_ff=down.in_width,
        neurons=neurons,
    )


def _one_source(flow: Flow, down: Linear, sources: set[Node]) -> Node:
    if len(sources) != 1:
        what = ": an adapter adds to one of them" if len(without_adapters(flow, sources)) == 1 else ""
        raise MissError(down.node, "one source", f"the up projections read {len(sources)} different inputs{what}")
    (source,) = sources
    return source


def _check_private(walk: _Walk, inner: Sequence[Node], down: Linear) -> None:
    """Permuting neurons is legal only where nothing outside the region sees them."""
    inside = {*inner, down.node, *down.node.all_input_nodes}
    for node in (*(s.node for s in walk.streams), *inner):
        for user in consumers(node):
            if user in inside or not is_tensor(node) or op_name(user) in ("size", "sym_size", "getattr"):
                continue
            statistic = _statistic(user)
            if statistic is not None:
                raise MissError(user, *_blocked(statistic))
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


def _check_tokens_in(flow: Flow, down: Linear, x: Node) -> None:
    """Each row of x holds the features of one token: not one vector a sequence, not turned so that it mixes tokens."""
    path: list[Node] = []
    node, width = x, shape(x)[-1]
    for _ in range(MAX_REGION):
        if _features_last(flow, node):
            if path and not keeps_tokens(path[::-1], node):
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


def _check_output(down: Linear) -> None:
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
