"""Weights in two planes of 4 bits: codes that stand alone, and codes of what these left.

    high    any codes of the weights: rounded (`proxy_codes.quantise`), or of a quantiser that knows the inputs
    low     codes of weights - high, in the same format: a multiplier for each block of 32, a scale a row

A neuron is a row, whether of gate, up or down (whose columns are laid out as rows, in blocks along d_model): of each
plane is read what the neurons ask for. No weight is more than half a low step away from the sum of its planes: low
blocks take the next larger multiplier and clip nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltepass.kernels.proxy_codes import (
    LARGEST,
    Codes,
    in_blocks,
    integers,
    largest_multiplier,
    pack,
    quantise,
    steps_of,
)


def split(weights: Tensor, high: Codes | None = None) -> tuple[Codes, Codes]:
    """weights: [k, f, d] of any float dtype -> high and low. high: codes of them; None rounds to the nearest."""
    weights = weights.float()
    high = quantise(weights, blocks=True) if high is None else high
    rest = in_blocks(weights - dequantise(high, weights.shape[-1]))
    most = largest_multiplier(weights.shape[-1])
    step = steps_of(rest, most)
    multipliers = (rest.abs().amax(-1) / LARGEST / step[..., None]).ceil().clamp(1, most)
    units = (multipliers * step[..., None])[..., None]
    codes = (rest / units).round().clamp(-LARGEST, LARGEST)
    return high, Codes(pack(codes.flatten(-2)), multipliers.to(torch.uint8), step)


def dequantise(codes: Codes, d: int, wide: torch.dtype = torch.float32) -> Tensor:
    """[k, f, d] fp32; in fp64 to the last bit."""
    return (integers(codes.codes, codes.multipliers) * codes.scales.double()[..., None]).to(wide)[..., :d]
