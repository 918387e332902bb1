"""Match one FFN region, and learn what it computes by running it on other values, never by names.

The region lies between two or more "streams" (outputs of up linears) and the input of the down linear. It is run twice:
  on index tensors, which tells neuron i's row of every parameter and that no token is mixed with another;
  on sample values, which tells the activation (compared with every function that a kernel knows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ltepass.dataflow import (
    Flow,
    Linear,
    call,
    concrete,
    consumers,
    is_gate,
    is_movement,
    is_pointwise,
    is_tensor,
    op_name,
    shape,
    strip_views,
    tensor_inputs,
    value,
)


MAX_REGION = 64  # nodes; the longest activation in transformers has 14. Keeps the search linear in the graph's size


@dataclass(frozen=True, kw_only=True)
class Miss:
    """Why a linear is not the down projection of an FFN. `near` when enough of an FFN was seen to be worth a line."""

    node: Node
    check: str
    reason: str
    near: bool
    nearest: str = ""
    gate_op: Node | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Neuron i is index start + i * step along `dim` of the leaf `leaf`."""

    leaf: Node
    dim: int
    start: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One factor of the hidden units: the rows of one up linear, and of its bias."""

    linear: Linear
    rows: Rows
    bias: Rows | None


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


class _MissError(Exception):
    def __init__(self, node: Node, check: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.check, self.reason = node, check, reason


@dataclass
class _Walk:
    streams: list[Linear]
    leaves: list[Node]
    inner: set[Node]
    gates: list[Node]


def down_rows(down: Linear) -> Rows:
    return Rows(leaf=down.weight, dim=1 - down.out_dim, start=0, step=1)


def match_down(flow: Flow, down: Linear) -> Region | Miss:
    """Match the FFN whose down projection is `down`."""
    walk = _Walk([], [], set(), [])
    try:
        _walk_back(flow, down.x, walk)
        return _match(flow, down, walk)
    except _MissError as e:
        near = bool(walk.streams) and any(is_pointwise(n) and op_name(n) not in ("to", "dropout") for n in walk.inner)
        seen = ", ".join(dict.fromkeys(op_name(n) or "" for n in sorted(walk.inner)))
        return Miss(node=e.node, check=e.check, reason=e.reason, near=near, nearest=seen, gate_op=next(iter(walk.gates), None))


def _walk_back(flow: Flow, start: Node, walk: _Walk) -> None:
    """Collect the region behind `start`, nearest first; ends at linears and leaves, misses at anything else."""
    for node in chain((start,), (found for _, found in nx.bfs_edges(flow.back, start))):
        linear = flow.linear(node)
        if linear is not None:
            walk.streams.append(linear)
        elif node in flow.leaves:
            walk.leaves.append(node)
        elif is_pointwise(node) or is_movement(node):
            walk.inner.add(node)
            walk.gates += [node] if is_gate(node) else []
        else:
            what = op_name(node) or node.op
            raise _MissError(node, "elementwise", f"{what} stands between the up and the down projection")
        if len(walk.inner) > MAX_REGION:
            raise _MissError(node, "size", f"more than {MAX_REGION} elementwise operations before the down projection")


def _match(flow: Flow, down: Linear, walk: _Walk) -> Region:
    if not walk.streams:
        raise _MissError(down.node, "up", "no linear feeds this one through elementwise operations")
    if not any(is_pointwise(n) and op_name(n) not in ("to", "dropout") for n in walk.inner):
        raise _MissError(down.node, "activation", "two linears with no activation between them: a low-rank pair")
    sources = {strip_views(s.x) for s in walk.streams}
    if len(sources) != 1:
        raise _MissError(down.node, "one source", f"the up projections read {len(sources)} different inputs")
    x = sources.pop()
    inner = tuple(n for n in flow.nodes() if n in walk.inner)
    _check_private(down, walk.streams, inner)
    pieces, neurons = _index_propagation(flow, down, walk, inner)
    if down.width != shape(x)[-1]:
        raise _MissError(
            down.node, "residual width", f"maps width {shape(x)[-1]} to {down.width}: a head or an adapter, not an FFN"
        )
    pieces, activation = _identify(down, pieces, inner, walk)
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


def _check_private(down: Linear, streams: Sequence[Linear], inner: Sequence[Node]) -> None:
    """Permuting neurons is legal only where nothing outside the region sees them."""
    inside = {*inner, down.node}
    for node in (*(s.node for s in streams), *inner):
        for user in consumers(node):
            if user not in inside and is_tensor(node) and op_name(user) not in ("size", "sym_size", "getattr"):
                raise _MissError(user, "private", f"hidden units are also used by {op_name(user) or user.op}")


# --- the region run on index tensors -------------------------------------------------------------------------------

_Codes = dict[Any, list[Tensor]]  # stream or leaf -> the distinct index tensors of it that meet in a value


def _index_propagation(
    flow: Flow, down: Linear, walk: _Walk, inner: Sequence[Node]
) -> tuple[list[Piece], tuple[Rows, ...]]:
    """Which rows of which parameter make neuron i; misses when tokens or neurons are mixed."""
    env: dict[Node, Any] = {}
    for s in walk.streams:
        size = shape(s.node)
        env[s.node] = {s.node: [torch.arange(torch.Size(size).numel()).view(size)]}
    for leaf in walk.leaves:
        size = shape(leaf)
        per_neuron = value(leaf).numel() > 1
        env[leaf] = {leaf: [torch.arange(torch.Size(size).numel()).view(size)]} if per_neuron else {}
    for node in inner:
        env[node] = _propagate(node, env)
    codes = env[down.x]
    if not isinstance(codes, dict):
        raise _MissError(down.node, "index", "the down projection reads a tuple")
    pieces: list[Piece] = []
    neurons: list[Rows] = []
    for s in walk.streams:
        for code in codes.get(s.node, ()):
            start, step = _arithmetic(down, code, s.width)
            rows = Rows(leaf=s.weight, dim=s.out_dim, start=start, step=step)
            bias = None
            if isinstance(s.bias, Node):
                leaf = flow.leaf(s.bias)
                if leaf is None:
                    raise _MissError(s.node, "bias", "the bias is computed, not a parameter")
                bias = Rows(leaf=leaf[0], dim=0, start=start, step=step)
            pieces.append(Piece(linear=s, rows=rows, bias=bias))
            neurons += [rows] if bias is None else [rows, bias]
    for leaf_node in walk.leaves:
        for code in codes.get(leaf_node, ()):
            start, step = _arithmetic(down, code, code.shape[-1], tokens=False)
            neurons.append(Rows(leaf=leaf_node, dim=len(shape(leaf_node)) - 1, start=start, step=step))
    neurons.append(down_rows(down))
    if not pieces:
        raise _MissError(down.node, "index", "no up projection's rows reach the down projection")
    return pieces, tuple(dict.fromkeys(neurons))


def _propagate(node: Node, env: dict[Node, Any]) -> Any:
    """Codes of a region node from the codes of its inputs."""
    if is_movement(node):
        (source,) = (n for n in tensor_inputs(node) if n in env)
        if not isinstance(env[source], dict):  # getitem of a chunk: env holds a tuple of codes
            return env[source][node.args[1]]
        moved = {k: [_run(node, {source: c}) for c in cs] for k, cs in env[source].items()}
        return _split_codes(moved)
    out: _Codes = {}
    for source in tensor_inputs(node):
        for key, cs in env.get(source, {}).items():
            known = out.setdefault(key, [])
            known.extend(c for c in cs if not any(c.shape == k.shape and torch.equal(c, k) for k in known))
    return out


def _split_codes(moved: dict[Any, list[Any]]) -> Any:
    """{key: [tuple of tensors]} -> tuple of {key: [tensor]}; tensors stay as they are."""
    first = next((cs[0] for cs in moved.values() if cs), None)
    if not isinstance(first, (tuple, list)):
        return moved
    return tuple({k: [c[i] for c in cs] for k, cs in moved.items()} for i in range(len(first)))


def _run(node: Node, values: dict[Node, Any]) -> Any:
    """Run a node with some inputs replaced; sizes become integers."""

    def lookup(n: Node) -> Any:
        if n in values:
            return values[n]
        v = value(n)
        return v if isinstance(v, (int, float, bool)) else concrete(v) if isinstance(v, torch.SymInt) else v

    args = map_arg(node.args, lookup)
    kwargs = map_arg(node.kwargs, lookup)
    plain = torch.utils._pytree.tree_map_only(torch.SymInt, concrete, (args, kwargs))
    return call(node, *plain)


def _arithmetic(down: Linear, code: Tensor, width: int, tokens: bool = True) -> tuple[int, int]:
    """(start, step) of the rows in an index tensor; misses where tokens move or rows are no strided slice."""
    flat = code.reshape(-1, code.shape[-1])
    rows = flat[0] % width if tokens else flat[0]
    if flat.shape[-1] != down.in_width:
        raise _MissError(down.node, "index", f"{flat.shape[-1]} indices reach {down.in_width} neurons")
    if tokens:
        expected = torch.arange(flat.shape[0]).unsqueeze(1) * width + rows
        if not torch.equal(flat, expected):
            raise _MissError(down.node, "same token", "the region mixes tokens: a token's output reads another's input")
    start = int(rows[0])
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    if step <= 0 or not torch.equal(rows, start + step * torch.arange(len(rows))):
        raise _MissError(down.node, "strided rows", "a neuron's rows are no strided slice of the up weight")
    return start, step


# --- the region run on sample values --------------------------------------------------------------------------------


def _identify(down: Linear, pieces: list[Piece], inner: Sequence[Node], walk: _Walk) -> tuple[list[Piece], str]:
    """([gate, up] or [up], activation name): which known function the region computes on sample values."""
    from ltepass.kernels.reference import ACTIVATIONS

    custom = "custom(" + ",".join(dict.fromkeys(op_name(n) or "" for n in inner if is_pointwise(n))) + ")"
    if len(pieces) > 2 or any(shape(leaf) for leaf in walk.leaves):
        return pieces[:2], custom
    samples, streams = _samples(pieces, down.in_width)
    h = _evaluate(down, inner, streams)
    if h is None:
        return pieces[:2], custom
    h = h.reshape(-1, h.shape[-1])[: len(samples[0])]
    orders = [(0,)] if len(pieces) == 1 else [(0, 1), (1, 0)]
    for order in orders:
        for name, act in ACTIVATIONS.items():
            expected = act(samples[order[0]]) * (samples[order[1]] if len(order) == 2 else 1.0)
            if torch.allclose(h, expected, rtol=1e-6, atol=1e-6):
                return [pieces[i] for i in order], name
    return pieces[:2], custom


def _samples(pieces: list[Piece], d_ff: int) -> tuple[list[Tensor], dict[Node, Tensor]]:
    """Sample values per piece [tokens, d_ff] in fp64, laid into the streams' outputs. Reach: clamps far out show."""
    generator = torch.Generator().manual_seed(0)
    streams: dict[Node, Tensor] = {}
    samples = []
    for p in pieces:
        size = shape(p.linear.node)
        flat = streams.setdefault(p.linear.node, torch.zeros(size, dtype=torch.float64)).view(-1, size[-1])
        sample = torch.empty(flat.shape[0], d_ff, dtype=torch.float64).uniform_(-6.0, 6.0, generator=generator)
        reach = torch.randint(-4, 5, sample.shape, generator=generator).clamp_min(0)
        sample *= 10.0**reach
        flat[:, p.rows.start + p.rows.step * torch.arange(d_ff)] = sample
        samples.append(sample)
    return samples, streams


def _evaluate(down: Linear, inner: Sequence[Node], streams: dict[Node, Tensor]) -> Tensor | None:
    """h [.., d_ff] of the region in fp64; None where it cannot be run that way. Casts and dropout are left out."""
    env: dict[Node, Any] = dict(streams)
    skip = ("to", "dropout", "float", "half", "bfloat16", "type_as", "gate", "alias", "contiguous")
    for node in inner:
        if op_name(node) in skip:
            env[node] = env[tensor_inputs(node)[0]]
            continue
        try:
            env[node] = _run(node, env)
        except (RuntimeError, TypeError, NotImplementedError):
            return None
    h = env[down.x]
    return h if isinstance(h, Tensor) else None
