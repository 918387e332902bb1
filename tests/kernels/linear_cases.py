"""Random arguments of the linear ops, and their judge in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

import ltepass.kernels.linear  # noqa: F401 -- registers the ops
from ltepass.kernels import linear_reference, weight_formats

FORMATS = ("linear", "linear_int8", "linear_int4", "linear_int4 with a minimum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    format: str = "linear"
    T: int = 3
    d_in: int = 64
    d_out: int = 40
    dtype: torch.dtype = torch.float32
    bias: bool = True
    contiguous: bool = True
    seed: int = 0


def op(r: Recipe) -> Any:
    return getattr(torch.ops.ltepass, r.format.split()[0])


def make(r: Recipe) -> tuple[Any, ...]:
    """Arguments in schema order; d_in is rounded up to whole blocks where the format wants them."""
    gen = torch.Generator().manual_seed(r.seed)
    d_in = r.d_in if "int4" not in r.format else -(-r.d_in // 32) * 32
    x = torch.randn(r.T, d_in, generator=gen).to(r.dtype)
    weight = torch.randn(r.d_out, d_in, generator=gen) / max(d_in, 1) ** 0.5
    bias = torch.randn(r.d_out, generator=gen).to(r.dtype) if r.bias else None
    if not r.contiguous:
        x, weight = (torch.stack([t, t], -1)[..., 0] for t in (x, weight))
    return (x, *stored(r.format, weight.to(r.dtype)), bias)


def stored(format: str, weight: Tensor) -> tuple[Any, ...]:
    """What the op of this format takes between x and the bias."""
    if format == "linear":
        return (weight,)
    if format == "linear_int8":
        return weight_formats.quantise_int8(weight)
    return weight_formats.quantise_int4(weight, with_minimum="minimum" in format)


def dense(r: Recipe, stored: Sequence[Any]) -> Tensor:
    """The weight [d_out, d_in] of what `stored` gives."""
    if r.format == "linear":
        return stored[0]  # type: ignore[no-any-return]
    if r.format == "linear_int8":
        return weight_formats.dequantise_int8(*stored)
    return weight_formats.dequantise_int4(*stored)


def exact(r: Recipe, args: tuple[Any, ...]) -> Tensor:
    """fp64: of the floats as they are; of quantised weights, the integer definition."""
    if r.format == "linear":
        x, weight, bias = args
        return F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    definition = getattr(linear_reference, r.format.split()[0])
    return definition(*args, wide=torch.float64)  # type: ignore[no-any-return]


def size_of_terms(r: Recipe, args: tuple[Any, ...]) -> Tensor:
    """[T, d_out]: the sum of the sizes of all terms of an output: what rounding is relative to, whatever cancels."""
    x, *stored, bias = args
    if "minimum" in r.format:  # its terms are codes and minima
        stored[1:] = [t.abs() for t in stored[1:]]
    weight = dense(r, stored).double().abs()
    return F.linear(x.double().abs(), weight, None if bias is None else bias.double().abs())


def assert_values(r: Recipe, args: tuple[Any, ...], y: Tensor) -> None:
    """Within 1e-6 of the size of the terms, as fp32 sums are; of 16 bits, and one rounding of the output."""
    assert y.dtype == r.dtype
    wanted = exact(r, args)
    assert y.shape == wanted.shape
    rounding = 0 if r.dtype == torch.float32 else torch.finfo(r.dtype).eps / 2
    allowed = 1e-6 * size_of_terms(r, args) + rounding * wanted.abs() + torch.finfo(r.dtype).tiny
    assert ((y.double() - wanted).abs() <= allowed).all()
