"""Arguments of the routed ops with int8 weights, made of those of the float ops, and their judge in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import routed_int8_reference
from ltepass.kernels.linear_reference import quantise_inputs
from ltepass.kernels.routed_int8_reference import Int8Linear, scores
from ltepass.kernels.routed_schema import LINEAR, LINEAR_INT8, PROXY, PROXY_INT8, RoutedOp
from ltepass.kernels.weight_formats import dequantise_int8, quantise_int8
from tests.kernels.routed_cases import Recipe, carried_rounding, make, size_of_terms

FLOAT = {LINEAR_INT8: LINEAR, PROXY_INT8: PROXY}


def quantised(op: RoutedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the float op -> those of `op`; codes have the strides that the weights had."""
    c = FLOAT[op].call(args)
    up, up_bias, gate, gate_bias, down, down_bias = c.weights
    codes, scales = zip(*((None, None) if w is None else quantise_int8(w) for w in (up, gate, down)), strict=True)
    router = c.router if op is PROXY_INT8 else (*quantise_int8(c.router[0]), c.router[1])
    weights = (codes[0], up_bias, codes[1], gate_bias, codes[2], down_bias)
    return (c.x, *router, c.threshold, *weights, *scales, *args[FLOAT[op].n_tensors :])


def decided(op: RoutedOp, args: tuple[Any, ...]) -> Tensor:
    """By the definition, from the arguments of `op`."""
    return op.mask(op.checked(args))


def only_the_mask(op: RoutedOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same decision over an FFN that tells it: output e adds up expert e's hidden units, none of which is 0."""
    c = op.checked(args)
    d_ff, d_model = c.weights[0].shape
    n, x = op.n_experts(c), c.x
    up, gate = torch.zeros(d_ff, d_model, dtype=torch.int8), None
    ones, none = torch.ones(d_ff, dtype=x.dtype), None
    down = torch.eye(n, dtype=torch.int8).repeat_interleave(d_ff // n, 1)
    if op is PROXY_INT8 and c.router[0].shape[0] == 2:
        gate, none = up.clone(), ones
    scales = (torch.ones(d_ff), None if gate is None else torch.ones(d_ff), torch.ones(n))
    return (x, *c.router, c.threshold, up, ones, gate, none, down, None, *scales, c.activation)


def call(op: RoutedOp, args: tuple[Any, ...]) -> Tensor:
    y: Tensor = getattr(torch.ops.ltepass, op.name)(*args)
    return y


def same_decision(which: RoutedOp, args: tuple[Any, ...]) -> None:
    """Of tokens without a fault, whose inactive neurons would hide nothing."""
    wanted, y = decided(which, args), call(which, only_the_mask(which, args))
    sound = args[0].isfinite().all(-1)
    assert torch.equal((y != 0)[sound], wanted[sound])


def with_close_calls(recipe: Recipe) -> Iterator[tuple[Any, ...]]:
    """Arguments with a random router, and thresholds that are logits: the last bit of a logit decides."""
    args = list(quantised(LINEAR_INT8, make(recipe)))
    gen = torch.Generator().manual_seed(recipe.seed)
    args[1:3] = quantise_int8(torch.randn(recipe.n_experts, recipe.d_model, generator=gen))
    logits = scores(args[0], Int8Linear(*args[1:4])).flatten()
    for i in torch.randint(0, max(len(logits), 1), (3,), generator=gen).tolist():
        for step in (-torch.inf, None):  # just below, and itself
            at = logits[i] if len(logits) else torch.tensor(0.0)
            yield (*args[:4], at if step is None else at.nextafter(torch.tensor(step)), *args[5:])


def exact(op: RoutedOp, args: tuple[Any, ...], mask: Tensor) -> Tensor:
    """fp64: the definition, of a given decision."""
    c = op.checked(args)
    return routed_int8_reference.masked_ffn(c.x, mask, *c.int8_linears(), c.activation, c.cut, wide=torch.float64)


def stand_for(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The float op's arguments, in fp64, that the codes of LINEAR_INT8's stand for, x rounded as up and gate see it."""
    c = LINEAR_INT8.call(args)
    router = (dequantise_int8(*c.router[:2]), c.router[2])
    up, up_bias, gate, gate_bias, down, down_bias, *scales = c.weights
    codes, scale = quantise_inputs(c.x)
    x = (codes * scale[..., None]).flatten(-2)[..., : c.x.shape[-1]]
    weights = [None if w is None else dequantise_int8(w, s) for w, s in zip((up, gate, down), scales, strict=True)]
    wide = (x, *router, c.threshold, weights[0], up_bias, weights[1], gate_bias, weights[2], down_bias)
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
