"""Formats of quantised weights, written and read.

int8: codes [d_out, d_in] int8 in [-127, 127], scale [d_out] fp32; w = code * scale.
4 bits: blocks of 32 along d_in, codes [d_out, d_in / 2] uint8, scale and minimum [d_out, d_in / 32] fp16. Byte j of a
block holds weight j in its low and weight j + 16 in its high half, as GGUF's Q4_0 (w = (code - 8) * scale) and Q4_1
(w = code * scale + minimum) do: their blocks can be taken over bit by bit. "gguf" is whichever of the two a weight lies
on already, and int8 for others.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

Format = Literal["int8", "int4", "int4_minimum", "gguf"]
SparseFormat = Literal["int8", "int4"]
"""Those that the sparse op reads"""
Parts = tuple[Tensor | None, ...]
"""Codes and scale, and of 4 bits the minimum, or None: what the format's linear takes. Of a down projection in 4 bits
whose blocks lie along its outputs, codes uint8 [d_in, d_out / 2] and scale fp16 [d_in, d_out / 32] alone, which the
sparse op takes.
"""
BLOCK = 32  # inputs that share a scale
HALF = BLOCK // 2
_LEAST = torch.finfo(torch.float32).tiny  # a scale below it has no inverse: the block counts as 0
_MOST = torch.finfo(torch.float32).max


def takes(format: Format | None, d_in: int) -> bool:
    """Whether rows of so many inputs can be held so."""
    return format in ("int8", "gguf") or d_in % BLOCK == 0


def sparse_format(format: Format | None) -> SparseFormat | None:
    """What FFNs of the sparse op become where linears become this; None: they stay in floats."""
    return "int8" if format == "int8" else "int4" if format == "int4" else None


def quantise(weight: Tensor, format: Format) -> Parts:
    """weight: [d_out, d_in]."""
    if format == "int8":
        return quantise_int8(weight)
    if format == "gguf":
        return kept_codes(weight) or quantise_int8(weight)
    return quantise_int4(weight, with_minimum=format == "int4_minimum")


def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [d_out, d_in] -> codes int8 of its shape, scale fp32 [d_out]."""
    return to_int8(weight.float())


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same, codes stored a row an output."""
    codes, scale = quantise_int8(weight)
    return codes.contiguous(), scale


def int8_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same, codes stored an input after the other."""
    codes, scale = quantise_int8(weight)
    return codes.t().contiguous().t(), scale


def int4_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [n, d], d a multiple of 32 -> codes uint8 [n, d / 2], scale fp16 [n, d / 32], a row after the other."""
    codes, scale, _ = quantise_int4(weight, with_minimum=False)
    return codes.contiguous(), scale.contiguous()


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows: [..., n] fp32 -> codes int8 [..., n], scale [...]: max / 127; NaN and Inf stay in the scale."""
    scale = F.pad(rows.abs(), (0, 1)).amax(-1) / 127  # one 0 more, for rows of none
    usable = (scale >= _LEAST) & (scale <= _MOST)
    inverse = torch.where(usable, 1 / scale, 0)[..., None]
    codes = torch.where(usable[..., None], (rows * inverse).round(), 0)  # a tie goes to the even code
    return codes.to(torch.int8), scale


def lies_by_input(parts: Parts) -> bool:
    """Whether these are codes of 4 bits whose blocks lie along the outputs of an input."""
    return len(parts) == 2 and parts[0] is not None and parts[0].dtype == torch.uint8


def quantise_int4(weight: Tensor, *, with_minimum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight: [d_out, d_in], d_in a multiple of 32 -> codes, scale and minimum, the very bits of GGUF's Q4_0, or of
    Q4_1 with a minimum.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    if with_minimum:
        low = blocks.amin(-1, keepdim=True)
        scale, half = (blocks.amax(-1, keepdim=True) - low) / 15, 0.5
    else:
        low = torch.zeros_like(blocks[..., :1])
        scale, half = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8, 8.5
    inverse = torch.where(scale == 0, 0, 1 / scale)
    codes = ((blocks - low) * inverse + half).trunc().clamp(0, 15).to(torch.uint8)
    return pack_int4(codes.flatten(-2)), scale[..., 0].half(), low[..., 0].half() if with_minimum else None


def kept_codes(weight: Tensor) -> Parts | None:
    """Of weights that came from blocks of Q4_0 or Q4_1, as llama.cpp rounds to them: the codes that they had."""
    if not takes("int4", weight.shape[1]):
        return None
    both = (quantise_int4(weight, with_minimum=minimum) for minimum in (False, True))
    return next((parts for parts in both if torch.equal(dequantise_int4(*parts), weight.float())), None)


def pack_int4(codes: Tensor) -> Tensor:
    """codes: [..., d_in] uint8 in [0, 15] -> [..., d_in / 2], two a byte."""
    low, high = codes.unflatten(-1, (-1, 2, HALF)).unbind(-2)
    packed: Tensor = low | high << 4
    return packed.flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """The reverse of `pack_int4`."""
    halves: Tensor = torch.stack([packed & 15, packed >> 4], -1).unflatten(-2, (-1, HALF))
    return halves.transpose(-1, -2).flatten(-3)


def dequantise_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """[..., d_in] fp32."""
    return codes * scale[..., None]


def dequantise_int4(codes: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """[..., d_in] fp32."""
    blocks: Tensor = unpack_int4(codes).unflatten(-1, (-1, BLOCK)).float()
    offset = -8 * scale.float() if minimum is None else minimum.float()
    weight = blocks * scale.float()[..., None] + offset[..., None]
    return weight.flatten(-2)
