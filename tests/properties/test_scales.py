"""Factors between the linears: one a neuron moves with its neuron, one a token stays, whichever numbers are larger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ltepass
from ltepass.errors import NoFFNFoundError
from tests.typed import lte_state

MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda k: k,
    "exp": torch.exp,
    "softplus": nn.functional.softplus,
    "doubled": lambda k: k * 2,
    "cast": lambda k: k.double().float(),
    "two casts and a sum": lambda k: (k.to(torch.float64) + 1).to(torch.float32),
}


class Scaled(nn.Module):
    """y = x + down(relu(up(n(x))) * made(scale)); turned: the factor meets the hidden units as [d_ff, tokens]."""

    def __init__(self, d: int, f: int, made: str, turned: bool, per_token: bool) -> None:
        super().__init__()
        self.made, self.turned, self.per_token = MADE[made], turned, per_token
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, f), nn.Linear(f, d)
        self.scale = nn.Parameter(torch.rand(f) + 0.5)
        self.score = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Any:
        z = self.norm(x)
        h, k = torch.relu(self.up(z)), self.made(self.scale)
        h = (h.transpose(-1, -2) * k.unsqueeze(-1)).transpose(-1, -2) if self.turned else h * k
        return x + self.down(h * torch.sigmoid(self.score(z)) if self.per_token else h)


@given(
    sizes=st.tuples(st.integers(2, 9), st.integers(2, 6), st.integers(1, 5), st.integers(1, 30)),
    made=st.sampled_from(sorted(MADE)),
    turned=st.booleans(),
    per_token=st.booleans(),
)
def test_a_factor_of_the_neurons_is_permuted_with_them_at_any_number_of_tokens(
    sizes: tuple[int, int, int, int], made: str, turned: bool, per_token: bool
) -> None:
    d, f, batch, length = sizes
    model = Scaled(d, 2 * f, made, turned, per_token).eval()
    x = torch.randn(batch, length, d)
    y = model(x)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=2, grouping="random"))
    (site,) = lte_state(model).sites
    assert "scale" in {rows.param for rows in site.neurons}
    assert torch.allclose(model(x), y, atol=1e-5)


class Excited(nn.Module):
    """One factor a neuron, made of all tokens together: no parameter, so nothing can be permuted."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.pool = nn.LayerNorm(d), nn.Linear(d, f), nn.Linear(f, d), nn.Linear(d, f)

    def forward(self, x: Tensor) -> Any:
        z = self.norm(x)
        return x + self.down(torch.relu(self.up(z)) * torch.sigmoid(self.pool(z.mean((0, 1)))))


@pytest.mark.parametrize("shape", [(1, 3, 6), (4, 9, 6), (1, 16, 6)])
def test_a_factor_of_the_neurons_that_is_no_parameter_is_refused(shape: tuple[int, ...]) -> None:
    model = Excited(6, 16).eval()
    with pytest.raises(NoFFNFoundError):
        ltepass.transform(model, torch.randn(shape), ltepass.LTEConfig(group_size=2, grouping="random"))


class Kept(nn.Module):
    """One factor a neuron that lies in no parameter: a buffer, a tensor on the module, weights that are buffers."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 16), nn.Linear(16, 6)
        self.scale = torch.rand(16) + 0.5
        if where == "a linear's buffer":
            weight = self.up.weight.detach()
            del self.up.weight
            self.up.register_buffer("weight", weight)
        elif where != "a plain tensor":
            del self.scale
            self.register_buffer("scale", torch.rand(16) + 0.5, persistent=where == "a buffer")

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.relu(self.up(self.norm(x))) * self.scale)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("where", ["a buffer", "a buffer that is not saved", "a plain tensor", "a linear's buffer"])
def test_a_factor_that_no_checkpoint_need_hold_is_refused_by_name(where: str, traced: bool) -> None:
    model: nn.Module = Kept(where).eval()
    x = torch.randn(4, 9, 6)
    y = model(x)
    if traced:
        model = torch.fx.symbolic_trace(model)
    name = "up.weight" if where == "a linear's buffer" else "scale"
    with pytest.raises(NoFFNFoundError, match=f"{name} has an entry for each neuron, and only an nn.Parameter"):
        ltepass.transform(model, x, ltepass.LTEConfig(group_size=2, grouping="random"))
    assert torch.equal(model(x), y)


def test_a_single_neuron_is_no_factor() -> None:
    """Its hidden units have the shape of one number a token, as a factor has."""
    model = nn.Sequential(nn.LayerNorm(8), Narrow(8)).eval()
    ltepass.transform(model, torch.randn(2, 3, 8))
    (site,) = lte_state(model).sites
    assert site.d_ff == 1


class Narrow(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 1), nn.Linear(1, d)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(torch.relu(self.up(x)))
