"""What the linear ops mean, in plain PyTorch.

x is quantised too, to int8 in blocks of 32 along d_in, with an fp32 scale a block. Sums within a block are integers,
exact in any order; what follows is fp32. That integer computation is the definition, not an approximation of it. The
formats of the weights: `weight_formats.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.weight_formats import BLOCK, dequantise_int4, dequantise_int8, to_int8, unpack_int4


def embedding_int8(ids: Tensor, codes: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """ids: [...] int64 -> [..., d_in], rows of a table."""
    return dequantise_int8(codes[ids], scale[ids]).to(dtype)


def embedding_int4(ids: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """The same for 4 bits."""
    return dequantise_int4(codes[ids], scale[ids], None if minimum is None else minimum[ids]).to(dtype)


def quantise_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., d_in] -> codes int8 [..., n_blocks, 32], scale fp32 [..., n_blocks]; zeros behind the last input."""
    padded = F.pad(x.float(), (0, -x.shape[-1] % BLOCK))
    return to_int8(padded.unflatten(-1, (-1, BLOCK)))


def linear_int8(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, wide: torch.dtype = torch.float32
) -> Tensor:
    """x: [..., d_in] -> [..., d_out] in x.dtype; sums over blocks in `wide` (fp64: the judge of other orders)."""
    weights = F.pad(codes, (0, -codes.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    x_codes, x_scale = quantise_inputs(x)
    y = x_scale.new_zeros((*x.shape[:-1], len(codes)), dtype=wide)
    for b in range(weights.shape[1]):
        y += x_scale[..., b, None].to(wide) * _sums(x_codes[..., b, :], weights[:, b]).to(wide)
    return _finish(y * scale.to(wide), bias, x.dtype)


def linear_int4(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """x: [..., d_in] -> [..., d_out] in x.dtype; sums over blocks in `wide` (fp64: the judge of other orders)."""
    weights = unpack_int4(codes).to(torch.int8).unflatten(-1, (-1, BLOCK))
    x_codes, x_scale = quantise_inputs(x)
    y = x_scale.new_zeros((*x.shape[:-1], len(codes)), dtype=wide)
    for b in range(weights.shape[1]):
        block = weights[:, b] - 8 if minimum is None else weights[:, b]
        y_b = scale[:, b].to(wide) * _sums(x_codes[..., b, :], block).to(wide)
        if minimum is not None:
            y_b = y_b + minimum[:, b].to(wide) * x_codes[..., b, :].sum(-1, keepdim=True).to(wide)
        y += x_scale[..., b, None].to(wide) * y_b
    return _finish(y, bias, x.dtype)


def linear_shortlist(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    scan_codes: Tensor,
    scan_scale: Tensor,
    rows: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x: [..., d_in] -> [..., d_out] in x.dtype: `linear_int4` of the scan; of each token, the outputs that are not
    below the `rows`-th largest by `linear_int8`. A token with a NaN stays as it is.
    """
    scan = linear_int4(x, scan_codes, scan_scale, None, bias)
    return shortlisted(scan, linear_int8(x, codes, scale, bias), rows)


def shortlisted(scan: Tensor, exact: Tensor, rows: int) -> Tensor:
    """Both [..., d_out]: exact where the scan is not below its `rows`-th largest."""
    if scan.shape[-1] == 0:
        return scan
    least = scan.topk(min(rows, scan.shape[-1])).values[..., -1:]
    best = (scan >= least) & ~scan.isnan().any(-1, keepdim=True)
    return torch.where(best, exact, scan)


def _sums(x_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """The integer sums of one block, as fp32: 32 * 127 * 128 is below 2^24, so none of them is rounded."""
    return F.linear(x_codes.float(), weight_codes.float())


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = y if bias is None else y + bias.to(y.dtype)
    return wide if wide.dtype == torch.float64 else wide.to(dtype)
