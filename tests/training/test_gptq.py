"""GPTQ against its textbook loop in fp64, and what it is for: less loss on inputs that go together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ltepass.calibration.gptq import DAMPING, codes_along_inputs, codes_by_input, feed_back
from ltepass.kernels.planes import dequantise
from ltepass.kernels.proxy_codes import Codes, quantise


def correlated(n: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator) @ torch.randn(width, width, generator=generator)


def moment_of(x: Tensor) -> Tensor:
    return x.T @ x


def slow(weights: Tensor, moment: Tensor, grid: float) -> Tensor:
    """Optimal brain quantisation in the inputs' order: H^-1 itself, one input eliminated after the other."""
    w, h = weights.double().clone(), moment.double().clone()
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    for i in range(len(w)):
        rounded = (w[i] / grid).round() * grid
        error = (w[i] - rounded) / inverse[i, i]
        for j in range(i + 1, len(w)):
            w[j] -= inverse[i, j] * error
        w[i] = rounded
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return w


@pytest.mark.parametrize("n", [3, 128, 150])  # within a panel, a panel, more than one
def test_it_is_the_textbook_loop(n: int) -> None:
    weights = torch.randn(n, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = moment_of(correlated(4 * n, n).double())
    seen: list[int] = []

    def rounded(i: int, left: Tensor) -> Tensor:
        seen.append(i)
        return (left[i] / 0.1).round() * 0.1

    got = feed_back(weights, moment, rounded)
    torch.testing.assert_close(got, slow(weights, moment, 0.1), rtol=0, atol=1e-9)
    assert seen == list(range(n))


def loss(weights: Tensor, codes: Codes, x: Tensor, *, by_input: bool) -> float:
    """|x dW|^2. weights: [k, f, d], whose inputs are f with by_input, else d."""
    change = weights - dequantise(codes, weights.shape[-1])
    out = x @ change[0] if by_input else torch.einsum("nd,kfd->nkf", x, change)
    return float(out.square().sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d", [40, 160])
def test_its_loss_is_below_that_of_rounding(seed: int, d: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(2, 30, d, generator=generator), correlated(500, d, seed)
    h, down = correlated(500, 30, seed), torch.randn(1, 30, d, generator=generator)
    along, by_input = codes_along_inputs(w, moment_of(x)), codes_by_input(down, moment_of(h))
    assert loss(w, along, x, by_input=False) < 0.8 * loss(w, quantise(w, blocks=True), x, by_input=False)
    assert loss(down, by_input, h, by_input=True) < 0.8 * loss(down, quantise(down, blocks=True), h, by_input=True)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_inputs_that_go_their_own_ways_leave_rounding(scale: float) -> None:
    """Also inputs that were never seen."""
    w = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(0))
    nearest = quantise(w, blocks=True)
    for got, want in zip(codes_along_inputs(w, scale * torch.eye(70)), nearest, strict=True):
        assert got is not None
        assert want is not None
        assert torch.equal(got, want)
    down = w[:1]
    for got, want in zip(codes_by_input(down, scale * torch.eye(9)), quantise(down, blocks=True), strict=True):
        assert got is not None
        assert want is not None
        assert torch.equal(got, want)


def test_weights_on_the_grid_stay() -> None:
    w = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    w = torch.where(w.abs() < 2, w, 2.0).mul(3.5).round() * 2.0**-4
    w[..., ::32] = 7 * 2.0**-4  # every block's largest, so that its unit is the grid's
    for codes in (
        codes_along_inputs(w, moment_of(correlated(300, 64))),
        codes_by_input(w, moment_of(correlated(40, 8))),
    ):
        torch.testing.assert_close(dequantise(codes, 64), w, rtol=1e-6, atol=0)
