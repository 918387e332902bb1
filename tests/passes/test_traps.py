"""Refusals are tested as hard as sites: no false site, the right reason, and no line where there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import NoFFNFoundError
from ltepass.passes.capture.capture_graphs import CaptureGraphs
from ltepass.passes.find.find_ffn import FindFFN
from ltepass.passes.graph.pipeline import TransformJob
from ltepass.routed.sites import Refusal
from tests.passes.ffn_forms import D, FusedHalves, Gated, H, Plain, Residual, sites_of, x_of
from tests.passes.traps import (
    SDPA,
    Attention,
    CrossGated,
    Deep,
    Experts,
    Head,
    LinearAttention,
    LowRank,
    Merge,
    Mixer,
    NormInside,
    RawParameters,
    Reversed,
    ShiftedGate,
    SqueezeExcite,
    StatisticInside,
    TokenwiseExcite,
    TopKInside,
    TwoBranches,
    Watched,
)
from tests.typed import lte_state


def refusals(model: nn.Module) -> list[Refusal]:
    """Refusals of a model in which nothing may be found."""
    job = TransformJob(model=model.eval(), config=ltepass.LTEConfig(), example_inputs=x_of())
    CaptureGraphs()(job)
    with pytest.raises(NoFFNFoundError) as error:
        FindFFN()(job)
    assert job.sites == []
    assert all(r.reason in str(error.value) for r in job.refusals)
    return job.refusals


SILENT: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "attention with a sigmoid gate": lambda: Attention(gated=True),
    "sdpa": SDPA,
    "sdpa with a silu gate": lambda: SDPA(gated=True),
    "low-rank pair": LowRank,
    "low-rank pair with dropout, scale and shift": lambda: LowRank(0.5),
    "two branches added": TwoBranches,
}
NEAR: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "running sum": (LinearAttention, "norm", "cumsum"),
    "shifted gate": (ShiftedGate, "same token", "mixes tokens"),
    "squeeze and excite": (SqueezeExcite, "same token", "one vector a sequence"),
    "squeeze and excite, no squashing": (lambda: SqueezeExcite(nn.Identity()), "same token", "one vector a sequence"),
    "excitation of each token": (TokenwiseExcite, "output", "goes into sigmoid"),
    "head over every token": (lambda: Head(7, pool=False), "residual width", "maps width 10 to 7"),
    "head over one token": (lambda: Head(7, pool=True), "residual width", "maps width 10 to 7"),
    "head as wide as the model": (lambda: Head(D, pool=True), "same token", "one vector a sequence"),
    "token mixing": (Mixer, "same token", "transposed"),
    "layer norm inside": (lambda: NormInside(nn.LayerNorm(H)), "norm", "layer_norm over the hidden units"),
    "softmax inside": (lambda: NormInside(nn.Softmax(-1)), "norm", "softmax over the hidden units"),
    "statistic inside": (StatisticInside, "norm", "mean over the hidden units"),
    "top-k inside": (TopKInside, "norm", "topk over the hidden units"),
    "cross gated": (CrossGated, "one source", "2 different inputs"),
    "two inputs merged to one score": (
        Merge,
        "one source",
        "2 different inputs and are added: a merge of several things to width 1",
    ),
    "two inputs merged": (lambda: Merge(D), "one source", "are added"),
    "hidden units watched": (Watched, "private", "also used by"),
    "reversed neurons": (Reversed, "strided rows", "no strided slice"),
    "parameters of the module": (RawParameters, "owner", "no linear module"),
    "experts": (Experts, "experts", "stack of 3 experts"),
    "experts by einsum": (lambda: Experts(gated=False), "experts", "stack of 3 experts"),
}


@pytest.mark.parametrize("trap", SILENT)
def test_nothing_is_found_and_nothing_is_said(trap: str) -> None:
    assert refusals(SILENT[trap]()) == []


@pytest.mark.parametrize("trap", NEAR)
def test_a_near_miss_is_one_line_with_the_check_that_failed(trap: str) -> None:
    make, check, text = NEAR[trap]
    (refusal,) = refusals(make())
    assert refusal.check == check
    assert text in refusal.reason
    assert refusal.node


def test_only_the_last_pair_of_a_deep_mlp_is_a_site() -> None:
    model = Deep()
    assert [(s.up, s.down) for s in sites_of(model)] == [("net.2", "net.4")]
    assert [(r.module, r.check) for r in lte_state(model).refusals] == [("net.2", "output")]


def test_real_ffns_among_traps_are_the_only_sites_and_refusals_do_not_flood() -> None:
    """A small decoder: gated attention, a low-rank pair and an FFN in every layer. Nothing is near an FFN but FFNs."""

    class Layer(nn.Module):
        def __init__(self, ffn: nn.Module) -> None:
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(D), nn.LayerNorm(D)
            self.attention, self.adapter, self.ffn = SDPA(gated=True), LowRank(0.5), ffn

        def forward(self, x: torch.Tensor) -> Any:
            x = x + self.attention(self.n1(x))
            return x + self.ffn(self.n2(x)) + self.adapter(x)

    layers = nn.Sequential(*(Layer(ffn) for ffn in (Plain(), Gated(), FusedHalves())), nn.LayerNorm(D), nn.Linear(D, 9))
    assert [s.owner for s in sites_of(layers)] == ["0.ffn", "1.ffn", "2.ffn"]
    assert lte_state(layers).refusals == []


def test_a_refused_ffn_beside_a_good_one_is_left_as_it_was() -> None:
    model = Residual(Plain(), StatisticInside(), Gated()).eval()
    middle = model.ffns[1]
    before = dict(middle.named_parameters())
    assert [s.owner for s in sites_of(model)] == ["ffns.0", "ffns.2"]
    assert type(middle) is StatisticInside
    assert all(p is before[n] for n, p in middle.named_parameters())
    (refusal,) = lte_state(model).refusals
    assert (refusal.module, refusal.check) == ("ffns.1.down", "norm")
    assert "relu" in refusal.nearest
    shown = str(ltepass.report(model))
    assert all(text in shown for text in ("nearest miss", refusal.module, refusal.node, refusal.check))


def test_experts_are_refused_and_the_shared_expert_beside_them_is_a_site() -> None:
    class MoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.shared, self.shared_gate = Experts(), Gated(), nn.Linear(D, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.experts(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)

    model = Residual(MoE(), Plain())
    assert [s.owner for s in sites_of(model)] == ["ffns.0.shared", "ffns.1"]
    assert [(r.module, r.check) for r in lte_state(model).refusals] == [("ffns.0.experts", "experts")]
