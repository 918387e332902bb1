"""Two models on the same blocks of text: what one costs over the other, and how sure the number is.

The unit is a block. Losses of neighbouring tokens depend on one another, for they share their context and their
subject, so an interval from single tokens would be far too narrow; blocks nearly stand for themselves. Differences
are paired: most of a loss is the text's, which both models read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ConfigError
from ltepass.measure.quality import next_token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIDENCE = 0.95
FEWEST_BLOCKS = 8  # below, the spread of so few differences says little of how sure their mean is


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A perplexity over another, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"x{self.value:.3f} ({self.low:.3f} .. {self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model over a dense one: ratio of perplexities; kl(dense || model) in nats per token; agreement: share of tokens
    at which both hold the same next token for the likeliest."""

    perplexity: float
    dense_perplexity: float
    ratio: Ratio
    kl: float
    agreement: float


@torch.no_grad()
def compare(model: PreTrainedModel, dense: PreTrainedModel, blocks: Tensor) -> Comparison:
    """Both models as they are, on one block after another. blocks: [n, T] int64, T at least 2.

    Raises ConfigError where there are fewer than 8 blocks, before either model runs, or two vocabularies.
    """
    require_enough(len(blocks))
    seen = [_compared(model, dense, block[None].to(model.device)) for block in blocks]
    losses, dense_losses, divergence, same = (torch.stack(rows) for rows in zip(*seen, strict=True))
    return Comparison(
        perplexity=math.exp(float(losses.mean())),
        dense_perplexity=math.exp(float(dense_losses.mean())),
        ratio=ratio_of_perplexities(losses, dense_losses),
        kl=float(divergence.mean()),
        agreement=float(same.mean()),
    )


def _compared(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids: [1, T] -> of T - 1 tokens, float64: loss, dense loss, KL(dense || model), 1 where the likeliest is one."""
    logits, dense_logits = (m(input_ids=ids.to(m.device)).logits[0, :-1].to(ids.device) for m in (model, dense))
    if logits.shape != dense_logits.shape:
        sizes = logits.shape[-1], dense_logits.shape[-1]
        raise ConfigError(f"the models know {sizes[0]} and {sizes[1]} tokens; expected one vocabulary")
    log_p, log_q = dense_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = logits.argmax(-1) == dense_logits.argmax(-1)
    losses = [next_token_losses(value, ids[0]) for value in (logits, dense_logits)]
    return losses[0], losses[1], divergence.double(), same.double()


def ratio_of_perplexities(losses: Tensor, base: Tensor) -> Ratio:
    """exp of the mean difference of losses, with the t interval of the blocks' mean differences.

    losses, base: [n, T] in nats, of the same tokens; a row is a block. Raises ConfigError below 8 rows.
    """
    if losses.shape != base.shape:
        raise ConfigError(f"losses are {list(losses.shape)} and {list(base.shape)}; expected those of the same tokens")
    require_enough(len(losses))
    differences = (losses.double() - base.double()).mean(-1)
    n, mean = len(differences), float(differences.mean())
    half = t_quantile(n - 1) * float(differences.std()) / math.sqrt(n)
    return Ratio(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def require_enough(blocks: int) -> None:
    if blocks < FEWEST_BLOCKS:
        raise ConfigError(
            f"there are {blocks} blocks of text, and an interval needs {FEWEST_BLOCKS}; expected more text or shorter "
            "blocks"
        )


def t_quantile(freedom: int) -> float:
    """Student's t that leaves out (1 - CONFIDENCE) / 2 above it, by Abramowitz and Stegun's expansion 26.7.5 around the
    normal quantile: 5e-5 off at 7 degrees of freedom, less with more."""
    x = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    terms: tuple[float, ...] = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
