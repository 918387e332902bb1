"""The time of each token inside `model.generate`, which is fed given tokens."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Given:
    """A logits processor that makes greedy decoding choose the given tokens, so that every side does the same work."""

    def __init__(self, tokens: Tensor, prompt_tokens: int) -> None:
        self._tokens, self._prompt_tokens = tokens, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._tokens[input_ids.shape[1] - self._prompt_tokens]] = torch.inf
        return scores


class _Clock:
    """A stopping criterion that never stops: `generate` asks it once a token, when the token is known."""

    def __init__(self) -> None:
        self.stamps = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        input_ids[0, -1].item()  # waits for the device
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def time_generate(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> list[float]:
    """Seconds that each token took, the first of which comes out of the prompt. prompt: [P], tokens: [N] int64."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    clock = _Clock()
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=len(tokens),
        min_new_tokens=len(tokens),
        do_sample=False,
        logits_processor=LogitsProcessorList([_Given(tokens, len(prompt))]),
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert torch.equal(out[0, len(prompt) :], tokens), "generate did not take the given tokens"
    return [b - a for a, b in pairwise(clock.stamps)]
