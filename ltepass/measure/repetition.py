"""How much greedy continuations repeat themselves: what perplexity does not see, and a reader does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
