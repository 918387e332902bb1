"""A model over another on the same blocks: the ratio, and an interval that holds the truth as often as it says."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ltepass.errors import ConfigError
from ltepass.measure.quality import FEWEST_BLOCKS, compare, perplexity, ratio_of_perplexities, t_quantile, token_losses

VOCABULARY = 13
# Two-sided 95 %, as statistical tables have it.
T_TABLE = {7: 2.3646, 8: 2.3060, 15: 2.1314, 31: 2.0395, 63: 1.9983, 1000: 1.9623}
DRAWS = 4000


class Bigram(nn.Module):
    """The logits of the next token stand in a table: what `compare` asks of a model, and no more."""

    device = torch.device("cpu")

    def __init__(self, seed: int, like: Bigram | None = None, noise: float = 1.0) -> None:
        super().__init__()
        drawn = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.table: Tensor = drawn if like is None else like.table + noise * drawn
        self.calls = 0

    def forward(self, input_ids: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(logits=self.table[input_ids])


def text(seed: int, n: int = 9, T: int = 17) -> Tensor:
    return torch.randint(0, VOCABULARY, (n, T), generator=torch.Generator().manual_seed(seed))


def model(*args: Any, **kwargs: Any) -> Any:
    return Bigram(*args, **kwargs)


@given(seed=st.integers(0, 10**6), n=st.integers(FEWEST_BLOCKS, 20), T=st.integers(2, 30))
def test_a_model_is_itself(seed: int, n: int, T: int) -> None:
    one = model(seed)
    same = compare(one, model(seed), text(seed, n, T))
    assert (same.ratio.value, same.ratio.low, same.ratio.high) == (1.0, 1.0, 1.0)
    assert same.kl == 0.0
    assert same.agreement == 1.0
    assert same.perplexity == same.dense_perplexity == pytest.approx(perplexity(one, text(seed, n, T)), rel=1e-12)


@given(seed=st.integers(0, 10**6), noise=st.floats(0.01, 2.0))
def test_every_figure_is_that_of_fp64(seed: int, noise: float) -> None:
    dense = model(seed)
    sparse, blocks = model(seed + 1, dense, noise), text(seed)
    found = compare(sparse, dense, blocks)
    log_p, log_q = (m.table.double().log_softmax(-1) for m in (dense, sparse))
    before, after = blocks[:, :-1], blocks[:, 1:]
    p, q = -log_p[before, after], -log_q[before, after]
    assert found.perplexity == pytest.approx(float(q.mean().exp()), rel=1e-6)
    assert found.dense_perplexity == pytest.approx(float(p.mean().exp()), rel=1e-6)
    assert found.ratio.value == pytest.approx(float((q - p).mean().exp()), rel=1e-6)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[before]
    assert found.kl == pytest.approx(float(divergence.mean()), rel=1e-4, abs=1e-6)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    assert found.agreement == pytest.approx(float(same[before].double().mean()))
    by_block = (q - p).mean(-1)
    half = t_quantile(len(blocks) - 1) * float(by_block.std()) / math.sqrt(len(blocks))
    assert math.log(found.ratio.high) == pytest.approx(float(by_block.mean()) + half, abs=1e-6)
    assert math.log(found.ratio.low) == pytest.approx(float(by_block.mean()) - half, abs=1e-6)


@given(seed=st.integers(0, 10**6), shift=st.floats(-1.0, 1.0), share=st.floats(0.0, 1.0))
def test_a_known_shift_is_found_and_what_both_share_widens_nothing(seed: int, shift: float, share: float) -> None:
    """Blocks differ far more from one another than the two models do on any of them."""
    generator = torch.Generator().manual_seed(seed)
    base = 3 + torch.randn(12, 1, generator=generator) + torch.rand(12, 40, generator=generator)
    sure = ratio_of_perplexities(base + shift, base)
    assert [sure.value, sure.low, sure.high] == pytest.approx([math.exp(shift)] * 3, rel=1e-5)
    noise = 0.1 * share * torch.randn(12, 40, generator=generator)
    found = ratio_of_perplexities(base + shift + noise, base)
    assert found.low <= found.value <= found.high
    assert math.log(found.high / found.low) <= 0.2 * share + 1e-5
    turned = ratio_of_perplexities(base, base + shift + noise)
    assert [turned.value, turned.low, turned.high] == pytest.approx([1 / found.value, 1 / found.high, 1 / found.low])


@pytest.mark.parametrize("blocks", [FEWEST_BLOCKS, 30])
def test_the_interval_holds_the_truth_in_95_of_100_draws(blocks: int) -> None:
    """Tokens of a block share half of their variance. Four standard errors of the count are 1.4 %; an interval by the
    normal quantile would hold 91 % at 8 blocks, one from single tokens half."""
    generator = torch.Generator().manual_seed(blocks)
    held = 0
    for _ in range(DRAWS):
        shared, own = torch.randn(blocks, 1, generator=generator), torch.randn(blocks, 16, generator=generator)
        ratio = ratio_of_perplexities(0.2 + 0.1 * (shared + own), torch.zeros(blocks, 16))
        held += ratio.low <= math.exp(0.2) <= ratio.high
    assert held / DRAWS == pytest.approx(0.95, abs=0.014)


@pytest.mark.parametrize("freedom", T_TABLE)
def test_the_quantile_is_the_tables(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(T_TABLE[freedom], abs=6e-5)


def test_too_few_blocks_are_refused_before_a_model_runs() -> None:
    few, one = text(0, FEWEST_BLOCKS - 1), model(0)
    with pytest.raises(ConfigError, match="7 blocks of text, and an interval needs 8"):
        compare(one, one, few)
    assert one.calls == 0
    losses = token_losses(one, few)
    with pytest.raises(ConfigError, match="an interval needs 8"):
        ratio_of_perplexities(losses, losses)
    other = model(1)
    other.table = other.table[:, :5]
    with pytest.raises(ConfigError, match="know 13 and 5 tokens; expected one vocabulary"):
        compare(one, other, text(0))
    with pytest.raises(ConfigError, match=r"\[9, 16\] and \[9, 15\]; expected those of the same tokens"):
        ratio_of_perplexities(torch.zeros(9, 16), torch.zeros(9, 15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_of_each_next_token(dtype: torch.dtype) -> None:
    one, blocks = model(3), text(3)
    one.table = one.table.to(dtype)
    losses = token_losses(one, blocks)
    assert losses.dtype == torch.float64
    assert losses.shape == (9, 16)
    expected = -one.table.double().log_softmax(-1)[blocks[:, :-1], blocks[:, 1:]]
    torch.testing.assert_close(losses, expected, atol=2e-6, rtol=0)
