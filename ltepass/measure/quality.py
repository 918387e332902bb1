"""Quality on held-out text: perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ltepass.old_names import held_by

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
    Raises: nothing of its own.
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
    return losses_of(lambda block: model(input_ids=block[None]).logits[0], blocks.to(model.device))


def losses_of(logits_of: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
    """`token_losses` of any program."""
    return torch.stack([next_token_losses(logits_of(block)[:-1], block) for block in blocks]).cpu()


def next_token_losses(logits: Tensor, block: Tensor) -> Tensor:
    """logits: [T - 1, vocabulary] after each token of a block [T] but the last -> [T - 1] float64."""
    return nn.functional.cross_entropy(logits.float(), block[1:], reduction="none").double()


def logits_on_cpu(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[1, T, vocab] on the CPU."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.cpu().contiguous()
