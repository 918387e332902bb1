"""The sparse op on int8 weights, beside the contenders of `ways.py`."""

from __future__ import annotations

from typing import Any

import torch

from examples.bench.ways import Shape, Weights, decide
from ltepass.kernels import routed_ffn  # noqa: F401 -- defines the op
from ltepass.kernels.routed_int8_reference import Int8Linear, scores
from ltepass.kernels.weight_formats import int8_columns, int8_rows, quantise_int8
from ltepass.measure.timing import Contender


def sparse_int8(shape: Shape, weights: list[Weights], sparsity: float) -> Contender:
    """The op on int8 weights, the router too, as `ltepass.lower(model, linears="int8")` calls it."""
    d = decide(shape, sparsity)
    router = Int8Linear(*quantise_int8(d.router), None)
    assert torch.equal(scores(d.x, router) > 0, d.active), "rounding the router changes the decision it was made for"
    calls: list[tuple[Any, ...]] = []
    for w in weights:
        up, down = int8_rows(w.up), int8_columns(w.down)
        gate = (None, None) if w.gate is None else int8_rows(w.gate)
        codes = (up[0], None, gate[0], None, down[0], None, up[1], gate[1], down[1])
        calls.append((d.x, router.codes.clone(), router.scale, None, torch.tensor(0.0), *codes, shape.activation))
    op = torch.ops.ltepass.routed_ffn_int8
    return lambda i: op(*calls[i % len(calls)])
