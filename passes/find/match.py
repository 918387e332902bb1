"""Match one FFN region, and learn what it computes by running it on other values, never by names.

The region lies between one or more "streams" (outputs of up linears) and the input of the down linear. It runs twice:
  on index tensors (neuron_rows.py), which tells neuron i's row of every parameter and that no two tokens are mixed;
  on sample values (identify_activation.py), which tells the activation: compared with every one that a kernel knows.
The checks around it (region_checks.py) ask whether a gate before the down projection switches a neuron off and nothing
else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ltepass.passes.find.identify_activation import identify
from ltepass.passes.find.match_types import Miss, MissError, Piece, Rows
from ltepass.passes.find.neuron_rows import trace_rows
from ltepass.passes.find.region_checks import (
    MAX_REGION,
    MAX_SOURCES,
    blocked,
    check_output,
    check_private,
    check_tokens_in,
    is_near,
    one_source,
)
from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import (
    is_gate,
    is_movement,
    is_plain_tensor,
    is_pointwise,
    numel,
    op_name,
    shape,
)
from ltepass.passes.graph.walk import breadth_first, strip_views
from ltepass.routed.which_sites import Match

__all__ = ["Miss", "Piece", "Region", "Rows", "down_rows", "match_down"]


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


def match_down(flow: Flow, down: Linear, match: Match = "ffn") -> Region | Miss:
    """Match the FFN whose down projection is `down`."""
    walk = _Walk()
    try:
        _walk_back(flow, down, walk)
        return _match(flow, down, walk, match)
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
            raise MissError(node, *blocked(node))
        if len(walk.sources) > MAX_SOURCES:
            raise MissError(
                down.node, "one source", f"the up projections read more than {MAX_SOURCES} different inputs"
            )
        if len(walk.inner) > MAX_REGION:
            raise MissError(node, "size", f"more than {MAX_REGION} elementwise operations before the down projection")


def _match(flow: Flow, down: Linear, walk: _Walk, match: Match) -> Region:
    if not walk.streams:
        raise MissError(down.node, "up", "no linear feeds this one through elementwise operations")
    if not any(is_pointwise(n) and op_name(n) not in ("to", "dropout") for n in walk.inner):
        raise MissError(down.node, "activation", "two linears with no activation between them: a low-rank pair")
    x = one_source(flow, down, walk.sources, walk.inner)
    inner = tuple(sorted(walk.inner))
    check_private(walk.streams, inner, down)
    pieces, neurons = trace_rows(flow, down, walk.streams, walk.leaves, walk.scales, inner)
    if match == "ffn" and down.width != shape(x)[-1]:
        widths = f"maps width {shape(x)[-1]} to {down.width}: a head or an adapter, not an FFN"
        raise MissError(down.node, "residual width", f'{widths} (match="mlp" takes it)')
    check_tokens_in(flow, down, x)
    check_output(down)
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
