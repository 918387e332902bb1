"""Codes of 4 bits that a proxy holds of gate and up, and a plane of tiers of any of the three.

Codes are integers in [-7, 7], stored 8 higher, two a byte as `pack_int4` lays them; a row has an fp32 scale, and with
scales in blocks each 32 inputs of it have an integer multiplier:

    w_ji = code_ji * multiplier_j,block(i) * scale_j

so that the sums of a whole row are integers, exact in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.weight_formats import BLOCK, pack_int4, unpack_int4

LARGEST = 7  # of a code
ZERO = 8  # how code 0 is stored
MULTIPLIERS = 63  # the largest, where d_model allows it: a sum stays below 2^31
CLIPS = (1.0, 0.92, 0.84, 0.76)  # of a block's largest weight: what rounds best is taken; 11 of them gain 1 % of error


class Codes(NamedTuple):
    """Of k = 1 (up) or 2 (gate, up) linears of f neurons.

    codes: uint8 [k, f, 16 blocks]; multipliers: uint8 [k, f, blocks] or None; scales: fp32 [k, f].
    """

    codes: Tensor
    multipliers: Tensor | None
    scales: Tensor


def blocks_of(d_model: int) -> int:
    return -(-d_model // BLOCK)


def largest_multiplier(d_model: int) -> int:
    return min(MULTIPLIERS, (2**31 - 1) // (127 * LARGEST * max(d_model, 1)))


def quantise(weights: Tensor, *, blocks: bool) -> Codes:
    """weights: [k, f, d_model] -> their codes, zeros behind the last input; blocks: a multiplier for each 32 inputs."""
    d_model = weights.shape[-1]
    rows = in_blocks(weights.float())
    if not blocks:
        codes, _, units = fit_codes(rows.flatten(-2), None, 1)
        return Codes(pack(codes), None, units)
    most = largest_multiplier(d_model)
    step = steps_of(rows, most)
    codes, multipliers, _ = fit_codes(rows, step[..., None], most)
    return Codes(pack(codes.flatten(-2)), multipliers.to(torch.uint8), step)


def in_blocks(rows: Tensor) -> Tensor:
    """[..., d] -> [..., blocks, 32], zeros behind the last."""
    blocks: Tensor = F.pad(rows, (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    return blocks


def steps_of(rows: Tensor, most: int) -> Tensor:
    """rows: [..., blocks, 32] -> [...]: a row's largest weight is the largest code times the largest multiplier."""
    step = rows.abs().amax((-1, -2)) / LARGEST / most
    return step.clamp_min(torch.finfo(torch.float32).tiny)


def fit_codes(rows: Tensor, step: Tensor | None, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows: [..., n] that share a unit each -> codes [..., n], multipliers [...] and units [...], the best of CLIPS.

    A unit is a multiplier in [1, most] times step [...]; without a step it is any number, and the multiplier 1.
    """
    wanted = rows.abs().amax(-1) / LARGEST
    best = torch.full_like(wanted, torch.inf)
    codes, multipliers, units = torch.zeros_like(rows), torch.ones_like(wanted), wanted
    for clip in CLIPS:
        if step is None:
            factors, unit = torch.ones_like(wanted), clip * wanted.clamp_min(torch.finfo(torch.float32).tiny)
        else:
            factors = (clip * wanted / step).round().clamp(1, most)
            unit = factors * step
        tried = (rows / unit[..., None]).round().clamp(-LARGEST, LARGEST)
        error = (tried * unit[..., None] - rows).square().sum(-1)
        better = error < best
        best, codes = best.where(~better, error), codes.where(~better[..., None], tried)
        multipliers, units = multipliers.where(~better, factors), units.where(~better, unit)
    return codes, multipliers, units


def pack(codes: Tensor) -> Tensor:
    """codes: [..., 32 blocks] integers in [-7, 7], of any dtype -> uint8 [..., 16 blocks]."""
    return pack_int4((codes + ZERO).to(torch.uint8))


def integers(codes: Tensor, multipliers: Tensor | None) -> Tensor:
    """codes times multipliers: [k, f, 32 blocks] fp64, which holds the sums exactly."""
    weights = unpack_int4(codes).double() - ZERO
    if multipliers is None:
        return weights
    scaled: Tensor = weights.unflatten(-1, (-1, BLOCK)) * multipliers.double()[..., None]
    return scaled.flatten(-2)
