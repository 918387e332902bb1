"""What the linear ops take: shapes and dtypes, checked before any path runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels.weight_formats import BLOCK, HALF

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """What no path of `linear` can make sense of; the C++ kernel makes the same checks itself."""
    _check_matrix("weight", weight, x.dtype)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise LTEError(f"x is {words(x)} and weight {words(weight)}; expected [..., d_in] and [d_out, d_in]")
    _check_bias(bias, x, weight.shape[0])


def check_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """What no path of `linear_int8` can make sense of."""
    _check_input(x)
    _check_matrix("codes", codes, torch.int8)
    if x.dim() == 0 or x.shape[-1] != codes.shape[1]:
        raise LTEError(f"x is {words(x)} and codes {words(codes)}; expected [..., d_in] and [d_out, d_in]")
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        raise LTEError(f"scale is {words(scale)}; expected float32 [{codes.shape[0]}], one for each row of codes")
    _check_bias(bias, x, codes.shape[0])


def check_int4(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None = None) -> None:
    """What no path of `linear_int4` can make sense of."""
    _check_input(x)
    _check_matrix("codes", codes, torch.uint8)
    d_in = 2 * codes.shape[1]
    if d_in % BLOCK:
        raise LTEError(f"codes are {words(codes)}, two a byte: d_in is {d_in}; expected a multiple of {BLOCK}")
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise LTEError(
            f"x is {list(x.shape)} and codes {list(codes.shape)}; expected [..., d_in] and [d_out, d_in / 2]"
        )
    for name, t in (("scale", scale), ("minimum", minimum)):
        if t is not None and (t.dtype != torch.float16 or t.shape != (codes.shape[0], codes.shape[1] // HALF)):
            expected = f"float16 [{codes.shape[0]}, {d_in // BLOCK}], one for each block of {BLOCK}"
            raise LTEError(f"{name} is {words(t)}; expected {expected}")
    _check_bias(bias, x, codes.shape[0])


def words(t: Tensor) -> str:
    """For a message: "float32 [40, 64]"."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _check_input(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise LTEError(f"x is {words(x)}; expected float32, bfloat16 or float16")


def _check_matrix(name: str, t: Tensor, dtype: torch.dtype) -> None:
    if t.dim() != 2 or t.dtype != dtype:
        raise LTEError(f"{name} is {words(t)}; expected a matrix of {str(dtype).removeprefix('torch.')}")


def _check_bias(bias: Tensor | None, x: Tensor, d_out: int) -> None:
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (d_out,)):
        expected = f"{str(x.dtype).removeprefix('torch.')} [{d_out}], x's dtype and one for each output"
        raise LTEError(f"bias is {words(bias)}; expected {expected}")
