"""Random FFNs: dense mode is the original, grouping a permutation, lowered equals hard eager, remove undoes all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ltepass
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.which_sites import Match
from tests.properties.trees import examples
from tests.typed import lte_state


@dataclass(frozen=True)
class Form:
    d_model: int
    out_width: int | None  # where it is not d_model
    experts: int
    group: int
    activation: str
    gated: bool
    fused: bool
    bias: bool
    inline: bool
    active: str  # which experts pass: "none", "some", "all"
    tokens: tuple[int, ...]

    @property
    def d_ff(self) -> int:
        return self.experts * self.group

    @property
    def d_out(self) -> int:
        return self.out_width or self.d_model

    @property
    def match(self) -> Match:
        return "ffn" if self.out_width is None else "mlp"


forms = st.builds(
    Form,
    d_model=st.sampled_from([3, 8, 16, 33]),
    out_width=st.sampled_from([None, None, 1, 5, 40]),  # none of them a d_model
    experts=st.integers(1, 9),
    group=st.sampled_from([1, 3, 4, 8, 17]),
    activation=st.sampled_from([a for a in ACTIVATIONS if a != "identity"]),
    gated=st.booleans(),
    fused=st.booleans(),
    bias=st.booleans(),
    inline=st.booleans(),
    active=st.sampled_from(["none", "some", "all"]),
    tokens=st.sampled_from([(1, 1), (2, 3), (1, 17), (5, 7)]),
)


class FFN(nn.Module):
    """One that reads nothing but its modules and its activation when it runs: it can be regenerated."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        d, f = form.d_model, form.d_ff
        self.act = ACTIVATIONS[form.activation]
        self.up = nn.Linear(d, 2 * f if form.gated and form.fused else f, bias=form.bias)
        if form.gated and not form.fused:
            self.gate = nn.Linear(d, f, bias=form.bias)
        self.down = nn.Linear(f, form.d_out, bias=form.bias)


class Plain(FFN):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class Fused(FFN):
    def forward(self, x: Tensor) -> Any:
        g, u = self.up(x).chunk(2, dim=-1)
        return self.down(self.act(g) * u)


class Gated(FFN):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x) * self.act(self.gate(x)))


def ffn_of(form: Form) -> FFN:
    return (Plain if not form.gated else Fused if form.fused else Gated)(form)


class Block(nn.Module):
    """The FFN after a norm, in a residual where it is as wide; `inline` puts its linears where hooks serve them."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.norm, self.ffn, self.inline = nn.LayerNorm(form.d_model), ffn_of(form), form.inline
        self.residual = form.out_width is None

    def forward(self, x: Tensor, scale: float | None = None) -> Any:
        y = type(self.ffn).forward(self.ffn, self.norm(x)) if self.inline else self.ffn(self.norm(x))
        y = y if scale is None else scale * y
        return x + y if self.residual else y


def build(form: Form, grouping: str) -> tuple[Block, nn.Module, Tensor]:
    torch.manual_seed(form.experts)
    model = Block(form).eval()
    x = torch.randn(*form.tokens, form.d_model)
    plain = Block(form).eval()
    plain.load_state_dict(model.state_dict())
    config = ltepass.LTEConfig(group_size=form.group, grouping=grouping)
    ltepass.transform(model, x, config, match=form.match)
    for router in routers_of(model):
        router.threshold.fill_({"none": torch.inf, "some": 0.0, "all": -torch.inf}[form.active])
    return model, plain, x


@examples(40)
@given(forms)
@torch.no_grad()
def test_dense_mode_is_bitwise_the_original_under_identity_grouping(form: Form) -> None:
    model, plain, x = build(form, "identity")
    assert [s.kind for s in lte_state(model).sites] == ["inline" if form.inline else "aligned"]
    assert torch.equal(model(x), plain(x))


@examples(40)
@given(forms)
@torch.no_grad()
def test_grouping_is_a_permutation_and_comes_off_again(form: Form) -> None:
    model, plain, x = build(form, "random")
    (site,) = lte_state(model).sites
    permutation = router_of(model, site).permutation
    assert torch.equal(permutation.sort().values, torch.arange(form.d_ff))
    for rows in site.neurons:
        ours, theirs = rows.of(model, form.d_ff), rows.of(plain, form.d_ff)
        assert torch.equal(ours, theirs[permutation])
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    ltepass.remove(model, undo_grouping=True)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), plain(x))


@examples(40)
@given(forms)
@torch.no_grad()
def test_lowered_equals_hard_eager(form: Form) -> None:
    model, plain, x = build(form, "random")
    (site,) = lte_state(model).sites
    assert site.activation == form.activation
    ltepass.set_mode(model, "hard")
    expected = model(x)
    if form.active == "all":
        assert torch.allclose(expected, plain(x), atol=1e-5)
    ltepass.lower(model)
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    ltepass.unlower(model)
    assert torch.equal(model(x), expected)
