"""Quality on held-out text: perplexity, what one model costs over another and how sure that is, and repetition.

Two models are compared on the same blocks, and the unit is a block. Losses of neighbouring tokens depend on one
another, for they share their context and their subject, so an interval from single tokens would be far too narrow;
blocks nearly stand for themselves. Differences are paired: most of a loss is the text's, which both models read.
Repetition in greedy continuations is what perplexity does not see, and a reader does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltepass.errors import ConfigError
from ltepass.old_names import held_by
from ltepass.progress import steps
from ltepass.routed.routed import require_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:  # of ours each name is read where it lies
    __getattr__ = held_by(__name__)


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: Tensor) -> float:
    """exp of the mean cross-entropy in nats over every next token, one block at a time, in the present mode.

    Arguments:
        model: a causal language model, transformed or not.
        blocks: token ids, [n, T] int64, T at least 2.
    Returns: the perplexity, a float.
    Raises: ConfigError (no module).
    Example:
        >>> 1 < ltepass.perplexity(dense, ids) < 100
        True
    """
    return math.exp(float(token_losses(model, blocks).mean()))


def perplexity_of(logits_of: Callable[[Tensor], Tensor], blocks: Tensor) -> float:
    """The same of any program. logits_of: a block [T] -> [T, vocabulary]; blocks: [n, T] int64."""
    return math.exp(float(losses_of(logits_of, blocks).mean()))


@torch.no_grad()
def token_losses(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """[n, T - 1] float64 on the CPU: cross-entropy in nats of every next token. blocks: [n, T] int64, T at least 2."""
    require_module(model)
    return losses_of(lambda block: model(input_ids=block[None]).logits[0], blocks.to(model.device))


def losses_of(logits_of: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    """`token_losses` of any program; [0] of no blocks, whose mean is NaN."""
    if not len(blocks):
        return torch.empty(0, dtype=torch.float64)
    told = steps("losses of blocks", blocks)
    return torch.stack([next_token_losses(logits_of(block)[:-1], block) for block in told]).cpu()


def next_token_losses(logits: Tensor, block: Tensor) -> Tensor:
    """logits: [T - 1, vocabulary] after each token of a block [T] but the last -> [T - 1] float64."""
    return nn.functional.cross_entropy(logits.float(), block[1:], reduction="none").double()


def logits_on_cpu(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[1, T, vocab] on the CPU."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.cpu().contiguous()


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
    seen = [_compared(model, dense, block[None].to(model.device)) for block in steps("losses of blocks", blocks)]
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


GRAM = 4


def repetition(model: PreTrainedModel, prompts: Tensor, new_tokens: int, batch: int = 16) -> float:
    """Share of 4-grams that a greedy continuation has had before, over all prompts [n, T] int64, in the present mode.

    An end of text is not let through before `new_tokens`, 4 at least, so that every continuation is equally long.
    """
    return repeated_share(torch.cat([_continued(model, part, new_tokens) for part in prompts.split(batch)]))


def _continued(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    ids = prompts.to(model.device)
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    out: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
    return out[:, ids.shape[1] :].cpu()


def repeated_share(ids: Tensor) -> float:
    """Share of the 4-grams of each row that stand earlier in it too. ids: [n, T] int64, T at least 4."""
    grams = ids.unfold(-1, GRAM, 1)
    distinct = sum(len(torch.unique(row, dim=0)) for row in grams)
    return 1.0 - distinct / (grams.shape[0] * grams.shape[1])
