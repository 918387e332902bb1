"""The sparse op on weights of 8 and of 4 bits, beside the contenders of `ways.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.bench.ways import Shape, Weights, decide
from ltepass.kernels import routed_ffn  # noqa: F401 -- defines the ops
from ltepass.kernels.routed_codes_reference import CodedLinear, scores
from ltepass.kernels.routed_schema import LINEAR_INT4, LINEAR_INT8
from ltepass.kernels.weight_formats import int4_rows, int8_columns, int8_rows, quantise_int8
from ltepass.measure.timing import Contender

NAMES = {"sparse int8": LINEAR_INT8, "sparse int4": LINEAR_INT4}


def sparse_codes(name: str, shape: Shape, weights: list[Weights], sparsity: float) -> Contender:
    """The op on weights in codes, its router in int8, as `ltepass.lower(model, linears=...)` calls it."""
    d = decide(shape, sparsity)
    router = CodedLinear(*quantise_int8(d.router), None)
    assert torch.equal(scores(d.x, router) > 0, d.active), "rounding the router changes the decision it was made for"
    in_8_bits = NAMES[name] is LINEAR_INT8
    rows = int8_rows if in_8_bits else int4_rows
    columns: Callable[[Tensor], tuple[Tensor, Tensor]] = int8_columns if in_8_bits else lambda down: int4_rows(down.t())
    calls: list[tuple[Any, ...]] = []
    for w in weights:
        up, down = rows(w.up), columns(w.down)
        gate = (None, None) if w.gate is None else rows(w.gate)
        codes = (up[0], None, gate[0], None, down[0], None, up[1], gate[1], down[1])
        calls.append((d.x, router.codes.clone(), router.scale, None, torch.tensor(0.0), *codes, shape.activation))
    op = getattr(torch.ops.ltepass, NAMES[name].name)
    return lambda i: op(*calls[i % len(calls)])
