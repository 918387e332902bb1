"""Planes of tiers packed for a kernel that reads a token's weights once: what all neurons need in one stream, in the
order of its use, and what one of the best needs side by side.

    high    uint8 [groups, bytes], a row for each GROUP of neurons; gate and up in panels of PANEL neurons:
            of each panel, of gate and then of up: codes [blocks, 4, PANEL, 4], multipliers [blocks, PANEL], scales
            down, of the group before: codes [blocks, GROUP / 4, 16, 4], multipliers [blocks / 4, GROUP / 4, 4, 4],
            scales
    low     uint8 [d_ff, k + 1, bytes], of gate, up and down: codes [16 blocks], multipliers [blocks], scale at the end

Four bytes of a row lie beside those of the other rows of a panel, and bytes of four neurons of down side by side: what
a lane of a vector multiplies and adds. A group's columns of down are read once the next group is scanned. Every part
starts at a multiple of LINE bytes, with zeros before it. Behind the last neuron stand neurons of scale 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.proxy_codes import ZERO, Codes, blocks_of
from ltepass.kernels.tiers_reference import Planes
from ltepass.kernels.weight_formats import HALF

GROUP = 64
PANEL = 16
QUAD = 4  # bytes of a lane
LINE = 64
_SCALE = 4  # bytes


class Packed(NamedTuple):
    """high: uint8 [groups, bytes]; low: uint8 [d_ff, k + 1, bytes]."""

    high: Tensor
    low: Tensor


def shapes(k: int, d_ff: int, d_model: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Of `Packed`'s tensors."""
    blocks, groups = blocks_of(d_model), -(-d_ff // GROUP)
    panel, down, row = _bytes(blocks)
    return (groups, GROUP // PANEL * k * sum(panel) + sum(down)), (d_ff, k + 1, row)


def pack(planes: Planes) -> Packed:
    k, _, width = planes.high.codes.shape
    blocks = width // HALF
    high, down = (_whole_groups(codes) for codes in planes[:2])
    codes = high.codes.view(k, -1, GROUP // PANEL, PANEL, blocks, QUAD, QUAD).permute(1, 2, 0, 4, 5, 3, 6)
    multipliers = _multipliers(high).view(k, -1, GROUP // PANEL, PANEL, blocks).permute(1, 2, 0, 4, 3)
    scales = high.scales.view(k, -1, GROUP // PANEL, PANEL).permute(1, 2, 0, 3)
    panels = _in_lines(codes.flatten(3), multipliers.flatten(3), _bytes_of(scales))
    codes = down.codes.view(-1, GROUP // QUAD, QUAD, blocks, HALF).permute(0, 3, 1, 4, 2)
    padded = F.pad(_multipliers(down), (0, -blocks % QUAD))
    multipliers = padded.view(-1, GROUP // QUAD, QUAD, padded.shape[-1] // QUAD, QUAD).permute(0, 3, 1, 4, 2)
    columns = _in_lines(codes.flatten(1), multipliers.flatten(1), _bytes_of(down.scales.view(-1, GROUP)))
    columns = columns.roll(1, 0)
    low = planes.low
    rows = torch.cat((low.codes, _multipliers(low)), -1)
    rows = F.pad(rows, (0, -(rows.shape[-1] + _SCALE) % LINE))
    rows = torch.cat((rows, _bytes_of(low.scales[..., None])), -1)
    return Packed(torch.cat((panels.flatten(1), columns), -1).contiguous(), rows.transpose(0, 1).contiguous())


def unpack(packed: Packed, d_model: int, biases: Tensor | None = None) -> Planes:
    """What was packed."""
    (d_ff, linears, _), blocks = packed.low.shape, blocks_of(d_model)
    k, groups = linears - 1, len(packed.high)
    panel, down, _ = _bytes(blocks)
    both = packed.high.split((GROUP // PANEL * k * sum(panel), sum(down)), -1)
    codes, multipliers, scales = both[0].view(groups, GROUP // PANEL, k, -1).split(panel, -1)
    codes = codes.view(groups, GROUP // PANEL, k, blocks, QUAD, PANEL, QUAD).permute(2, 0, 1, 5, 3, 4, 6)
    multipliers = multipliers[..., : blocks * PANEL].unflatten(-1, (blocks, PANEL)).permute(2, 0, 1, 4, 3)
    high = _neurons(d_ff, codes.flatten(4), multipliers, _floats_of(scales).permute(2, 0, 1, 3))
    codes, multipliers, scales = both[1].roll(-1, 0).split(down, -1)
    codes = codes.view(groups, blocks, GROUP // QUAD, HALF, QUAD).permute(0, 2, 4, 1, 3)
    multipliers = multipliers.view(groups, -1, GROUP // QUAD, QUAD, QUAD).permute(0, 2, 4, 1, 3).flatten(3)
    columns = _neurons(d_ff, codes.flatten(3)[None], multipliers[None, ..., :blocks], _floats_of(scales)[None])
    rows = packed.low.transpose(0, 1)
    low = Codes(
        rows[..., : HALF * blocks].contiguous(),
        rows[..., HALF * blocks : (HALF + 1) * blocks].contiguous(),
        _floats_of(rows[..., -_SCALE:])[..., 0],
    )
    return Planes(high, columns, low, biases)


def _bytes(blocks: int) -> tuple[list[int], list[int], int]:
    """Of the parts of a panel, of the parts of a group's columns of down, and of a row of the low plane."""
    panel = [blocks * HALF * PANEL, -(-blocks * PANEL // LINE) * LINE, _SCALE * PANEL]
    down = [blocks * HALF * GROUP, -(-blocks // QUAD) * QUAD * GROUP, _SCALE * GROUP]
    return panel, down, -(-((HALF + 1) * blocks + _SCALE) // LINE) * LINE


def _multipliers(codes: Codes) -> Tensor:
    assert codes.multipliers is not None, "planes have scales in blocks"
    return codes.multipliers


def _whole_groups(codes: Codes) -> Codes:
    """[k, f, ...] -> [k, GROUP groups, ...]."""
    more = -codes.scales.shape[1] % GROUP
    return Codes(
        F.pad(codes.codes, (0, 0, 0, more), value=ZERO * 17),
        F.pad(_multipliers(codes), (0, 0, 0, more)),
        F.pad(codes.scales, (0, more)),
    )


def _neurons(d_ff: int, codes: Tensor, multipliers: Tensor, scales: Tensor) -> Codes:
    """Each [k, ..., neurons of a group, ...] -> the first d_ff of them, [k, d_ff, ...]."""
    k = len(codes)
    rows = [t.reshape(k, -1, t.shape[-1])[:, :d_ff].contiguous() for t in (codes, multipliers)]
    return Codes(rows[0], rows[1], scales.reshape(k, -1)[:, :d_ff].contiguous())


def _in_lines(*parts: Tensor) -> Tensor:
    """Parts [..., bytes] one after the other, each from a whole line on."""
    return torch.cat([F.pad(part, (0, -part.shape[-1] % LINE)) for part in parts], -1)


def _bytes_of(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _floats_of(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.float32)
