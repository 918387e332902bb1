"""Arguments of the routed ops with int8 weights, made of those of the float ops, and their judge in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import routed_int8_reference
from ltepass.kernels.linear_reference import quantise_inputs
from ltepass.kernels.routed_schema import LINEAR, LINEAR_INT8, PROXY, PROXY_INT8, RoutedOp
from ltepass.kernels.weight_formats import dequantise_int8, quantise_int8
from tests.kernels.routed_cases import carried_rounding, size_of_terms

FLOAT = {LINEAR_INT8: LINEAR, PROXY_INT8: PROXY}


def quantised(op: RoutedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the float op -> those of `op`; codes have the strides that the weights had."""
    at = _weights_at(op)
    parts = {i: (None, None) if args[i] is None else quantise_int8(args[i]) for i in at}
    out = [parts[i][0] if i in parts else a for i, a in enumerate(args)]
    n = FLOAT[op].n_tensors
    return (*out[:n], *(parts[i][1] for i in at), *out[n:])


def _weights_at(op: RoutedOp) -> tuple[int, int, int]:
    return tuple(op.n_router + i for i in (2, 4, 6))  # type: ignore[return-value]  # up, gate and down


def decided(op: RoutedOp, float_args: tuple[Any, ...]) -> Tensor:
    """What the float op's kernel decides: the same bits are asked of this one."""
    mask: Tensor = getattr(torch.ops.ltepass, f"{FLOAT[op].name}_with_mask")(*float_args)[1]
    return mask


def exact(op: RoutedOp, args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """fp64: the definition, of a given decision."""
    c = op.checked(args)
    return routed_int8_reference.masked_ffn(c.x, mask, *c.int8_linears(), c.activation, c.cut, wide=torch.float64)


def stand_for(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The float op's arguments, in fp64, that the codes of LINEAR_INT8's stand for, x rounded as up and gate see it."""
    c = LINEAR_INT8.call(args)
    up, up_bias, gate, gate_bias, down, down_bias, *scales = c.weights
    codes, scale = quantise_inputs(c.x)
    x = (codes * scale[..., None]).flatten(-2)[..., : c.x.shape[-1]]
    weights = [None if w is None else dequantise_int8(w, s) for w, s in zip((up, gate, down), scales, strict=True)]
    wide = (x, *c.router, c.threshold, weights[0], up_bias, weights[1], gate_bias, weights[2], down_bias)
    return (*(None if t is None else t.double() for t in wide), c.activation)


def assert_values(args: tuple[Any, ...], mask: Tensor, y: Tensor) -> None:
    """fp32: within 1e-6 of the size of the terms and what pre-activations carry; 16 bits: and one rounding of y."""
    wanted = exact(LINEAR_INT8, args, mask)
    assert y.shape == wanted.shape
    assert y.dtype == args[0].dtype
    if wanted.numel() == 0:
        return
    floats = stand_for(args)
    rounding = 0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    allowed = 1e-6 * size_of_terms(floats) + carried_rounding(floats) + rounding * wanted.abs()
    allowed = allowed + torch.finfo(y.dtype).tiny
    assert ((y.double() - wanted).abs() <= allowed).all()
