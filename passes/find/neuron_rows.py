"""A region run on index tensors: which rows of which parameter make neuron i, and that no token is mixed with another.

Every stream (output of an up linear) and every leaf gets its own indices as values. Movement moves them, pointwise
operations let several meet in one place. What arrives at the down projection says, for each of its inputs, which index
of which tensor it was made from: covers fused gate_up in halves or interleaved, chunks, views, and whatever comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ltepass.passes.find.match_types import MissError, Piece, Rows
from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import (
    is_movement,
    is_plain_tensor,
    numel,
    op_name,
    shape,
    tensor_inputs,
)
from ltepass.passes.graph.run_node import run

Codes = dict[Node, list[Tensor]]  # stream or leaf -> the distinct index tensors of it that meet in a value


def indices(node: Node) -> Tensor:
    """Every entry of a node's value, numbered."""
    return torch.arange(numel(node)).view(shape(node))


def trace_rows(
    flow: Flow,
    down: Linear,
    streams: Sequence[Linear],
    leaves: Sequence[Node],
    scales: Sequence[Node],
    inner: Sequence[Node],
) -> tuple[list[Piece], tuple[Rows, ...]]:
    """The up projections' rows that meet in each neuron, and every leaf slice with one entry per neuron.

    Raises MissError where tokens or neurons are mixed, rows are no strided slice, or a scale is not one of a token.
    """
    codes = _codes_at(down, streams, (*leaves, *scales), inner)
    pieces: list[Piece] = []
    neurons: list[Rows] = []
    for s in streams:
        for code in codes.get(s.node, ()):
            start, step = _arithmetic(down, code, s.width)
            rows = Rows(leaf=s.weight, dim=s.out_dim, start=start, step=step)
            bias = _bias_rows(flow, s, rows)
            pieces.append(Piece(linear=s, rows=rows, bias=bias))
            neurons += [rows] if bias is None else [rows, bias]
    if not pieces:
        raise MissError(down.node, "index", "no up projection's rows reach the down projection")
    neurons += [rows for leaf in leaves for code in codes.get(leaf, ()) for rows in _leaf_rows(down, leaf, code)]
    for scale in scales:
        if any(not per_token(_flat(down, code)) for code in codes.get(scale, ())):
            raise MissError(scale, "same token", f"{scale.name} scales each neuron, and is no parameter")
    neurons.append(Rows(leaf=down.weight, dim=1 - down.out_dim, start=0, step=1))
    return pieces, tuple(dict.fromkeys(neurons))


def per_token(rows: Tensor) -> bool:
    """Whether [tokens, neurons] holds one number for each token."""
    return bool((rows == rows[:, :1]).all())


def _bias_rows(flow: Flow, stream: Linear, rows: Rows) -> Rows | None:
    """Where each neuron's bias lies, beside the row of its weight."""
    if not isinstance(stream.bias, Node):
        return None
    seen = flow.leaf(stream.bias)
    if seen is None:
        raise MissError(stream.node, "bias", "the bias is computed, not a parameter")
    return Rows(leaf=seen[0], dim=0, start=rows.start, step=rows.step)


def _codes_at(down: Linear, streams: Sequence[Linear], factors: Iterable[Node], inner: Sequence[Node]) -> Codes:
    """What meets in the down projection's input."""
    env: dict[Node, Any] = {s.node: {s.node: [indices(s.node)]} for s in streams}
    for factor in factors:
        env[factor] = {factor: [indices(factor)]} if numel(factor) > 1 else {}
    for node in inner:
        try:
            env[node] = _propagate(node, env)
        except (RuntimeError, TypeError, ValueError, IndexError) as e:
            raise MissError(node, "index", f"{node.name} cannot be followed: {e}") from e
    codes = env[down.x]
    if not isinstance(codes, dict):
        raise MissError(down.node, "index", "the down projection reads a tuple")
    return codes


def _propagate(node: Node, env: dict[Node, Any]) -> Any:
    """Codes of a region node from the codes of its inputs."""
    if is_movement(node):
        (source,) = (n for n in tensor_inputs(node) if n in env)
        if not isinstance(env[source], dict):  # getitem of a chunk: env holds a tuple of codes
            return env[source][node.args[1]]
        moved = {k: [run(node, {source: c}) for c in cs] for k, cs in env[source].items()}
        return _split_codes(moved)
    out: Codes = {}
    for source in tensor_inputs(node):
        for key, cs in env.get(source, {}).items():
            known = out.setdefault(key, [])
            for code in cs:
                if op_name(node) == "prelu" and code.dim() == 1:  # its weight lies along dim 1, wherever that is
                    code = code.view(-1, *[1] * (len(shape(node)) - 2)).expand(shape(node))
                wide = code.expand(_broadcast(code, node))
                known += [] if any(torch.equal(wide, k) for k in known) else [wide]
    return out


def _broadcast(code: Tensor, node: Node) -> tuple[int, ...]:
    """What meets in a pointwise operation meets in the shape of its result."""
    return shape(node) if is_plain_tensor(node) else tuple(code.shape)


def _split_codes(moved: dict[Any, list[Any]]) -> Any:
    """{key: [tuple of tensors]} -> tuple of {key: [tensor]}; tensors stay as they are."""
    first = next((cs[0] for cs in moved.values() if cs), None)
    if not isinstance(first, (tuple, list)):
        return moved
    return tuple({k: [c[i] for c in cs] for k, cs in moved.items()} for i in range(len(first)))


def _arithmetic(down: Linear, code: Tensor, width: int) -> tuple[int, int]:
    """(start, step) of a stream's rows in an index tensor; misses where tokens are mixed."""
    flat = _flat(down, code)
    rows = flat[0] % width
    expected = torch.arange(flat.shape[0]).unsqueeze(1) * width + rows
    if not torch.equal(flat, expected):
        raise MissError(down.node, "same token", "the region mixes tokens: a token's output reads another's input")
    return _strided(down, rows)


def _leaf_rows(down: Linear, leaf: Node, code: Tensor) -> list[Rows]:
    """Where a leaf holds an entry per neuron; every token must see the same ones. Nowhere: one factor a token."""
    flat = _flat(down, code)
    along = [(dim, rows) for dim, rows in enumerate(torch.unravel_index(flat, shape(leaf))) if not per_token(rows)]
    if not along:
        return []
    if len(along) > 1 or not (along[0][1] == along[0][1][0]).all():
        raise MissError(down.node, "strided rows", "a parameter of the region gives tokens different neurons")
    start, step = _strided(down, along[0][1][0])
    return [Rows(leaf=leaf, dim=along[0][0], start=start, step=step)]


def _flat(down: Linear, code: Tensor) -> Tensor:
    """[tokens, neurons] of an index tensor that reaches the down projection."""
    flat = code.reshape(-1, code.shape[-1]) if code.dim() else code.reshape(1, 1)
    if flat.shape[-1] != down.in_width:
        raise MissError(down.node, "index", f"{flat.shape[-1]} indices reach {down.in_width} neurons")
    return flat


def _strided(down: Linear, rows: Tensor) -> tuple[int, int]:
    """(start, step) of rows that are a slice. Raises MissError where they are none."""
    start = int(rows[0])
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    if step <= 0 or not torch.equal(rows, start + step * torch.arange(len(rows))):
        raise MissError(down.node, "strided rows", "a neuron's rows are no strided slice of the up weight")
    return start, step
