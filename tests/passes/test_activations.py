"""Every activation that transformers knows is found and gated; fused when lowered where the op names it, else reported.

All of them stand in one model, plain and gated, so that one transform and one lowering serve the whole list.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import ACT2FN

import ltepass
from ltepass.errors import NoFFNFoundError
from ltepass.kernels import reference
from ltepass.routed.routed import router_of
from tests.passes.ffn_forms import D, Gated, H, Plain, Residual, check_exact, set_mode, sites_of, x_of
from tests.typed import lte_state

FUSED = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{"quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2", "linear": "identity"},
}
MASKED_DENSE = (
    "gelu_10 hardswish laplace leaky_relu mish relu6 sigmoid sqrtsoftplus tanh prelu xielu".split()
)  # no kernel names them


class PerNeuron(Plain):
    """A parameter of the activation for each neuron: it moves with the neuron when neurons are permuted."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(act)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.act(self.up(x).transpose(1, 2)).transpose(1, 2))


class Snake(nn.Module):
    """x + sin(a x)^2 / a, a learned per neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.a * x).sin().square() / self.a


def varied(model: nn.Module) -> nn.Module:
    """Parameters of activations differ from neuron to neuron."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1 and p.shape[0] in (1, H):
            p.data += 0.2 * torch.rand_like(p)
    return model.eval()


PARAMETRIC = {
    "one slope": lambda: Plain(nn.PReLU()),
    "a slope per neuron": lambda: PerNeuron(nn.PReLU(H)),
    "snake": lambda: Plain(Snake()),
    "swish with beta": lambda: Gated(_Beta()),
}
CLAMPED = {
    "clamped after": lambda: Plain(lambda x: F.gelu(x).clamp(-10, 10)),
    "clamped before": lambda: Plain(lambda x: F.silu(x.clamp(max=7.0))),
    "minimum with a tensor": lambda: Plain(lambda x: torch.minimum(F.relu(x), torch.tensor(3.0))),
}


class _Beta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.beta * x)


def test_the_lists_name_every_activation_of_transformers() -> None:
    assert sorted([*FUSED, *MASKED_DENSE]) == sorted(ACT2FN)


@pytest.mark.parametrize("form", [Plain, Gated])
def test_every_activation_is_found_gated_and_lowered_or_reported(form: type[nn.Module]) -> None:
    names = [n for n in ACT2FN if form is Gated or n != "linear"]
    torch.manual_seed(0)
    model = Residual(*(form(ACT2FN[n]) for n in names)).eval()
    expected = model(x_of())
    sites = sites_of(model, group_size=4, grouping="random")
    torch.testing.assert_close(model(x_of()), expected, rtol=1e-5, atol=1e-5)
    found = {names[int(s.owner.rpartition(".")[2])]: s for s in sites}
    assert set(found) == set(names)
    assert {n: found[n].activation for n in names if n in FUSED} == {n: FUSED[n] for n in names if n in FUSED}
    assert all(found[n].activation.startswith("custom(") for n in names if n not in FUSED)
    set_mode(model, "hard")
    with torch.no_grad():
        hard = model(x_of())
        assert not torch.allclose(hard, expected, atol=1e-3)
        ltepass.lower(model)
        torch.testing.assert_close(model(x_of()), hard, rtol=1e-5, atol=1e-5)
    noted = {names[int(note.partition(":")[0].rpartition(".")[2])]: note for note in ltepass.report(model).notes}
    assert set(noted) == {n for n in names if n not in FUSED}
    assert all("kept masked-dense: no kernel knows its activation" in note for note in noted.values())
    assert {n for n in names if router_of(model, found[n]).plan is not None} == {n for n in names if n in FUSED}


def test_a_linear_activation_without_a_gate_is_a_low_rank_pair() -> None:
    with pytest.raises(NoFFNFoundError, match="no candidate"):
        sites_of(Residual(Plain(ACT2FN["linear"])))


@pytest.mark.parametrize("name", [*PARAMETRIC, *CLAMPED])
def test_parametric_and_clamped_activations_are_gated_exactly_and_stay_dense(name: str) -> None:
    make = {**PARAMETRIC, **CLAMPED}[name]
    torch.manual_seed(0)
    model = varied(Residual(make()))
    (site,) = sites_of(Residual(make()))
    assert site.activation.startswith("custom(")
    assert (site.d_model, site.d_ff) == (D, H)
    check_exact(model, x_of(), lowered=False)


def test_a_parameter_per_neuron_moves_with_the_neuron() -> None:
    for make in (PARAMETRIC["a slope per neuron"], PARAMETRIC["snake"]):
        (site,) = sites_of(Residual(make()))
        assert any(r.param.startswith("ffns.0.act.") for r in site.neurons)
    (site,) = sites_of(Residual(PARAMETRIC["one slope"]()))
    assert not any(r.param.startswith("ffns.0.act.") for r in site.neurons)


class OneNeuron(nn.Module):
    def __init__(self, activation: str, gated: bool) -> None:
        super().__init__()
        self.act, self.norm = reference.ACTIVATIONS[activation], nn.LayerNorm(3)
        self.gate, self.up, self.down = nn.Linear(3, 1) if gated else None, nn.Linear(3, 1), nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> Any:
        z = self.norm(x)
        return x + self.down(self.act(self.up(z)) if self.gate is None else self.act(self.gate(z)) * self.up(z))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name != "identity"])
def test_one_value_at_a_time_is_enough_to_know_it(activation: str, gated: bool) -> None:
    """One token of one neuron is one sample; far out, several of the functions are the same number there."""
    model = ltepass.transform(OneNeuron(activation, gated).eval(), torch.randn(1, 1, 3))
    (site,) = lte_state(model).sites
    assert site.activation == activation
