"""Arguments of the routed ops with weights in codes, made of those of the float ops, and their judge in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import routed_codes_reference
from ltepass.kernels.linear_reference import quantise_inputs
from ltepass.kernels.routed_codes_reference import CodedLinear, scores
from ltepass.kernels.routed_schema import LINEAR, LINEAR_INT4, LINEAR_INT8, PROXY, PROXY_INT4, PROXY_INT8, RoutedOp
from ltepass.kernels.weight_formats import (
    BLOCK,
    dequantise_int4,
    dequantise_int8,
    pack_int4,
    quantise_int4,
    quantise_int8,
)
from tests.kernels.routed_cases import Recipe, carried_rounding, make, size_of_terms

FLOAT = {LINEAR_INT8: LINEAR, PROXY_INT8: PROXY, LINEAR_INT4: LINEAR, PROXY_INT4: PROXY}


def quantised(op: RoutedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the float op -> those of `op`; int8 codes have the strides that the weights had."""
    c = FLOAT[op].call(args)
    up, up_bias, gate, gate_bias, down, down_bias = c.weights
    if op.format == "int8":
        pairs = [(None, None) if w is None else quantise_int8(w) for w in (up, gate, down)]
    else:
        pairs = [(None, None) if w is None else _int4(w) for w in (up, gate, down.T)]
    codes, scales = zip(*pairs, strict=True)
    router = c.router if op.proxied else (*quantise_int8(c.router[0]), c.router[1])
    weights = (codes[0], up_bias, codes[1], gate_bias, codes[2], down_bias)
    return (c.x, *router, c.threshold, *weights, *scales, *args[FLOAT[op].n_tensors :])


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales as views, where the weight is one of strided rows."""
    codes, scale, _ = quantise_int4(weight, with_minimum=False)
    if weight.stride(-1) == 1:
        return codes, scale
    return torch.stack([codes, codes], -1)[..., 0], torch.stack([scale, scale], -1)[..., 0]


def decided(op: RoutedOp, args: tuple[Any, ...]) -> Tensor:
    """By the definition, from the arguments of `op`."""
    return op.mask(op.checked(args))


def only_the_mask(op: RoutedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same decision over an FFN that tells it: output e adds up expert e's hidden units, none of which is 0."""
    c = op.checked(args)
    d_ff = len(c.weights[0])
    n, x = op.n_experts(c), c.x
    ones = torch.ones(d_ff, dtype=x.dtype)
    mine = torch.eye(n, dtype=torch.int8).repeat_interleave(d_ff // n, 1)
    if op.format == "int8":
        up, down = torch.zeros(d_ff, x.shape[-1], dtype=torch.int8), mine
        up_scale, down_scale = torch.ones(d_ff), torch.ones(n)
    else:
        up = torch.full((d_ff, x.shape[-1] // 2), 0x88, dtype=torch.uint8)
        down = pack_int4(torch.nn.functional.pad(mine.T + 8, (0, -n % BLOCK), value=8).to(torch.uint8))
        up_scale, down_scale = (torch.ones(d_ff, 2 * w.shape[1] // BLOCK).half() for w in (up, down))
    gated = op.proxied and c.router[0].shape[0] == 2
    gate, none, gate_scale = (up.clone(), ones, up_scale) if gated else (None, None, None)
    scales = (up_scale, gate_scale, down_scale)
    return (x, *c.router, c.threshold, up, ones, gate, none, down, None, *scales, c.activation)


def call(op: RoutedOp, args: tuple[Any, ...]) -> Tensor:
    y: Tensor = getattr(torch.ops.ltepass, op.name)(*args)
    return y


def same_decision(which: RoutedOp, args: tuple[Any, ...]) -> None:
    """Of tokens without a fault, whose inactive neurons would hide nothing."""
    wanted, y = decided(which, args), call(which, only_the_mask(which, args))
    sound = args[0].isfinite().all(-1)
    assert torch.equal((y != 0)[sound][..., : wanted.shape[-1]], wanted[sound])


def with_close_calls(op: RoutedOp, recipe: Recipe) -> Iterator[tuple[Any, ...]]:
    """Arguments with a random router, and thresholds that are logits: the last bit of a logit decides."""
    args = list(quantised(op, make(recipe)))
    gen = torch.Generator().manual_seed(recipe.seed)
    args[1:3] = quantise_int8(torch.randn(recipe.n_experts, recipe.d_model, generator=gen))
    logits = scores(args[0], CodedLinear(*args[1:4])).flatten()
    for i in torch.randint(0, max(len(logits), 1), (3,), generator=gen).tolist():
        for step in (-torch.inf, None):  # just below, and itself
            at = logits[i] if len(logits) else torch.tensor(0.0)
            yield (*args[:4], at if step is None else at.nextafter(torch.tensor(step)), *args[5:])


def exact(op: RoutedOp, args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """fp64: the definition, of a given decision."""
    c = op.checked(args)
    return routed_codes_reference.masked_ffn(c.x, mask, *c.coded_linears(), c.activation, c.cut, wide=torch.float64)


def ties(op: RoutedOp, args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """[..., d_out]: what an output moves by where units in int8 are rounded the other way, as fp32 sums may round those
    that lie within 1e-5 of their block's largest from the middle of two codes.
    """
    c = op.checked(args)
    up, gate, down = c.coded_linears()
    if op.format != "int8":
        return torch.zeros(())
    rows = torch.eye(len(up.codes), dtype=torch.int8)
    units = CodedLinear(rows, torch.ones(len(rows)), None)  # instead of down: each unit as it is rounded
    rounded = routed_codes_reference.masked_ffn(c.x, mask, up, gate, units, c.activation, c.cut, wide=torch.float64)
    h = routed_codes_reference.hidden_units(c.x, mask, up, gate, c.activation, c.cut, wide=torch.float64)
    _, scale = quantise_inputs(h)
    step = scale.repeat_interleave(BLOCK, -1)[..., : h.shape[-1]].double()
    near = ((h - rounded).abs() / step - 0.5).abs() < 127e-5
    return torch.where(near, step, 0.0) @ dequantise_int8(down.codes, down.scale).double().abs().T


def stand_for(op: RoutedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The float op's arguments, in fp64, that the codes of a linear router's op stand for, x rounded as up and gate see
    it.
    """
    c = op.call(args)
    router = (dequantise_int8(*c.router[:2]), c.router[2])
    up, up_bias, gate, gate_bias, down, down_bias, *scales = c.weights
    codes, scale = quantise_inputs(c.x)
    x = (codes * scale[..., None]).flatten(-2)[..., : c.x.shape[-1]]
    floats = dequantise_int8 if op.format == "int8" else partial(dequantise_int4, minimum=None)
    wide_up, wide_down = floats(up, scales[0]), floats(down, scales[2])
    wide_gate = None if gate is None else floats(gate, scales[1])
    wide_down = wide_down if op.format == "int8" else wide_down.T
    wide = (x, *router, c.threshold, wide_up, up_bias, wide_gate, gate_bias, wide_down, down_bias)
    return (*(None if t is None else t.double() for t in wide), c.activation)


def assert_values(op: RoutedOp, args: tuple[Any, ...], mask: Tensor, y: Tensor) -> None:
    """fp32: within 1e-6 of the size of the terms and what pre-activations carry; 16 bits: and one rounding of y."""
    wanted = exact(op, args, mask)
    assert y.shape == wanted.shape
    assert y.dtype == args[0].dtype
    if wanted.numel() == 0:
        return
    floats = stand_for(op, args)
    rounding = 0 if y.dtype == torch.float32 else torch.finfo(y.dtype).eps / 2
    allowed = 1e-6 * size_of_terms(floats) + carried_rounding(floats) + rounding * wanted.abs()
    allowed = allowed + ties(op, args, mask) + torch.finfo(y.dtype).tiny
    assert ((y.double() - wanted).abs() <= allowed).all()
