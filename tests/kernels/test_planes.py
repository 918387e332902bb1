"""Two planes of 4 bits: what they hold together, and what the high one holds alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltepass.kernels.planes import dequantise, split
from ltepass.kernels.proxy_codes import LARGEST, MULTIPLIERS, Codes, quantise
from ltepass.kernels.weight_formats import BLOCK


def weights(k: int, f: int, d: int, seed: int = 0) -> Tensor:
    """With rows of zeros, of one outlier and of very small numbers."""
    w = torch.randn(k, f, d, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[0, 0] = 0.0
    w[-1, 1, d // 2] = 3.0
    w[-1, 2] *= 1e-20
    return w


def units(codes: Codes, d: int) -> Tensor:
    """[k, f, d]: of each weight, one step of its code."""
    assert codes.multipliers is not None
    steps = codes.multipliers.float() * codes.scales[..., None]
    return steps.repeat_interleave(BLOCK, -1)[..., :d]


@pytest.mark.parametrize("shape", [(3, 60, 24), (2, 5, 100), (1, 7, 32), (3, 4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_no_weight_is_half_a_low_step_from_the_sum_of_its_planes(shape: tuple[int, int, int], seed: int) -> None:
    w = weights(*shape, seed=seed)
    high, low = split(w)
    rest = (w.double() - dequantise(high, shape[-1]).double() - dequantise(low, shape[-1]).double()).abs()
    assert bool((rest <= 0.5001 * units(low, shape[-1])).all())


def test_the_sum_of_the_planes_is_as_exact_as_8_bits() -> None:
    w = torch.randn(2, 50, 96, generator=torch.Generator().manual_seed(0))
    high, low = split(w)
    alone, both = (
        float((w - value).norm() / w.norm())
        for value in (dequantise(high, 96), dequantise(high, 96) + dequantise(low, 96))
    )
    int8 = (w / (w.abs().amax(-1, keepdim=True) / 127)).round() * (w.abs().amax(-1, keepdim=True) / 127)
    assert both < 1.5 * float((w - int8).norm() / w.norm()) < 0.2 * alone


def test_weights_on_the_grid_leave_nothing_to_the_low_plane() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-LARGEST, LARGEST + 1, (2, 6, 3, BLOCK), generator=generator).float()
    codes[..., 0] = LARGEST
    multipliers = torch.randint(1, MULTIPLIERS + 1, (2, 6, 3), generator=generator).float()
    multipliers[..., 0] = MULTIPLIERS
    w = (codes * multipliers[..., None] * 2.0**-9).flatten(-2)
    high, low = split(w)
    assert torch.equal(dequantise(high, w.shape[-1]), w)
    assert not dequantise(low, w.shape[-1]).any()
    again = quantise(dequantise(high, w.shape[-1]), blocks=True)
    assert all(torch.equal(a, b) for a, b in zip(high, again, strict=True) if a is not None and b is not None)


def test_the_low_plane_is_of_what_given_codes_left() -> None:
    w = weights(1, 9, 64)
    other = quantise(w * 0.8, blocks=True)
    high, low = split(w, other)
    assert high is other
    rest = (w - dequantise(high, 64) - dequantise(low, 64)).abs()
    assert bool((rest <= 0.5001 * units(low, 64)).all())
    assert rest.norm() < 0.2 * (w - dequantise(high, 64)).norm()
