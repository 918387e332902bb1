"""Every written form of an FFN is found, gated exactly, lowered where a kernel knows it, and removed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import ltepass
from ltepass.routed.routed import router_of
from tests.passes.ffn_forms import (
    Apart,
    Conv,
    D,
    FusedHalves,
    Gated,
    H,
    Inline,
    Interleaved,
    OwnersBias,
    Plain,
    Residual,
    Scaled,
    Shared,
    Split,
    Unbound,
    check_exact,
    sites_of,
    x_of,
)
from tests.typed import lte_state, present

FORMS: dict[str, tuple[Any, str, str, bool]] = {  # name: model, activation, kind, lowered
    "plain": (lambda: Residual(Plain(F.gelu)), "gelu", "aligned", True),
    "plain without biases": (lambda: Residual(Plain(F.relu, bias=False)), "relu", "aligned", True),
    "relu squared": (lambda: Residual(Plain(lambda x: F.relu(x).square())), "relu2", "aligned", True),
    "gated": (lambda: Residual(Gated()), "silu", "aligned", True),
    "bilinear": (lambda: Residual(Gated(lambda x: x)), "identity", "aligned", True),
    "fused, gate first": (lambda: Residual(FusedHalves()), "silu", "inline", True),
    "fused, up first": (lambda: Residual(FusedHalves(gate_first=False, bias=False)), "silu", "inline", True),
    "interleaved rows": (lambda: Residual(Interleaved()), "silu", "inline", True),
    "interleaved, clamped": (lambda: Residual(Interleaved(0.4)), "custom(", "inline", False),
    "view and unbind": (lambda: Residual(Unbound()), "gelu", "aligned", True),
    "Conv1D": (lambda: Residual(Conv()), "gelu_tanh", "aligned", True),
    "bias added apart": (lambda: Residual(Apart()), "gelu", "aligned", False),
    "bias of the owner": (lambda: Residual(OwnersBias()), "relu", "aligned", False),
    "scaled neurons": (lambda: Residual(Scaled()), "custom(", "inline", False),
    "scaled tokens": (lambda: Residual(Scaled(per_token=True)), "custom(", "inline", False),
    "Sequential": (
        lambda: Residual(nn.Sequential(nn.Linear(D, H), nn.Dropout(0.1), nn.SiLU(), nn.Linear(H, D))),
        "silu",
        "aligned",
        True,
    ),
    "inline": (Inline, "gelu", "inline", True),
    "parallel with attention": (lambda: Inline(parallel=True), "gelu", "inline", True),
    "split over modules": (Split, "gelu", "inline", True),
    "called three times": (Shared, "gelu", "aligned", True),
    "a decoder layer of torch": (lambda: _decoder(activation="gelu"), "gelu", "inline", True),
    "an encoder layer of torch": (
        lambda: nn.TransformerEncoderLayer(D, 2, H, 0.1, "relu", batch_first=True, norm_first=True),
        "relu",
        "inline",
        True,
    ),
}


class _Decoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(D, 2, H, 0.1, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, x)


def _decoder(**options: Any) -> nn.Module:
    return _Decoder(**options)


@pytest.mark.parametrize("form", FORMS)
def test_form(form: str) -> None:
    torch.manual_seed(0)
    make, activation, kind, lowered = FORMS[form]
    (site,) = sites_of(make().eval(), group_size=4)
    assert site.activation.startswith(activation)
    assert (site.kind, site.d_model, site.d_ff) == (kind, D, H)
    check_exact(make().eval(), x_of(), lowered=lowered)


def test_the_same_module_under_two_names_is_one_site() -> None:
    torch.manual_seed(0)
    ffn = Plain()
    (site,) = sites_of(Residual(ffn, ffn), group_size=4)
    assert site.owner == "ffns.0"
    again = Plain()
    check_exact(Residual(again, again).eval(), x_of(), lowered=True)


def tied_twins() -> nn.Module:
    """Zamba's blocks: two modules, all weights of the one are the other's."""
    torch.manual_seed(0)
    a, b = Gated(bias=True), Gated(bias=True)
    for name in ("w1", "w2", "w3"):
        getattr(b, name).weight, getattr(b, name).bias = getattr(a, name).weight, getattr(a, name).bias
    return Residual(a, Plain(), b).eval()


def test_modules_that_share_all_their_weights_have_a_router_each_and_one_order() -> None:
    check_exact(tied_twins(), x_of(), lowered=True)
    model = tied_twins()
    sites = {s.owner: s for s in sites_of(model, group_size=4, grouping="random")}
    assert sorted(sites) == ["ffns.0", "ffns.1", "ffns.2"]
    first, second = (router_of(model, sites[owner]) for owner in ("ffns.0", "ffns.2"))
    assert first is not second
    assert torch.equal(first.permutation, second.permutation)
    assert not torch.equal(first.permutation, torch.arange(H))
    assert lte_state(model).refusals == []


def test_calibration_orders_shared_weights_once() -> None:
    model, original = tied_twins(), tied_twins()
    config = ltepass.LTEConfig(group_size=4, grouping="coactivation")
    ltepass.transform(model, x_of(), config, calibration=[x_of(4, 16)])
    first, second = (router_of(model, s) for s in lte_state(model).sites if s.owner != "ffns.1")
    assert torch.equal(first.permutation, second.permutation)
    assert not torch.equal(first.quantiles, second.quantiles)
    torch.testing.assert_close(model(x_of()), original(x_of()), rtol=1e-5, atol=1e-5)
    ltepass.remove(model, undo_grouping=True)
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in model.state_dict().items())


def test_two_modules_with_one_weight_are_refused() -> None:
    a, b, c = Plain(), Plain(), Gated()
    b.up.weight = a.up.weight
    model = Residual(a, b, c)
    assert [s.owner for s in sites_of(model)] == ["ffns.2"]
    assert {(r.module, r.check) for r in lte_state(model).refusals} == {("ffns.0", "tied"), ("ffns.1", "tied")}


def test_rows_are_the_ones_that_make_a_neuron() -> None:
    (halves,) = sites_of(FusedHalves(gate_first=True))
    gate, up = present(halves.gate_rows), halves.up_rows
    assert (gate.start, gate.step, up.start, up.step) == (0, 1, H, 1)
    (turned,) = sites_of(FusedHalves(gate_first=False))
    assert (present(turned.gate_rows).start, turned.up_rows.start) == (H, 0)
    (woven,) = sites_of(Interleaved())
    gate, up, bias = present(woven.gate_rows), woven.up_rows, present(woven.gate_bias)
    assert (gate.start, gate.step, up.start, up.step) == (0, 2, 1, 2)
    assert (bias.start, bias.step) == (0, 2)
    (conv,) = sites_of(Conv())
    assert (conv.up_rows.dim, conv.down_rows.dim) == (1, 0)
    (scaled,) = sites_of(Scaled())
    assert any(r.param == "scale" for r in scaled.neurons)


def test_where_no_kernel_knows_the_function_the_gate_factor_is_still_told_apart() -> None:
    """Grouping goes by the gate's rows (paper section 4.1), whichever of the two linears is written first."""

    class Turned(Gated):
        def forward(self, x: torch.Tensor) -> Any:
            return self.w2(self.w3(x) * F.mish(self.w1(x)))

    (site,) = sites_of(Turned())
    assert (site.gate, site.up) == ("w1", "w3")
