"""The time of each token inside `model.generate`, sides taking turns, all fed the same tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
        input_ids[0, -1].item()  # waits for the device
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def time_generate(
    sides: Mapping[str, PreTrainedModel], prompt: Tensor, tokens: Tensor, *, rounds: int, warmup_rounds: int = 1
) -> dict[str, list[float]]:
    """Seconds of each decoded token, by side: `rounds` calls of `generate` each, in turns whose order rotates.

    prompt: [P], tokens: [N] int64. The first two tokens of a call (prefill, and a cold start) are not returned, and
    nothing of the first `warmup_rounds` rounds, in which compiled sides compile.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(warmup_rounds + rounds):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            stamps = _stamps(sides[name], prompt, tokens)
            if turn >= warmup_rounds:
                times[name] += [b - a for a, b in pairwise(stamps[1:])]
    return times


def _stamps(model: PreTrainedModel, prompt: Tensor, tokens: Tensor) -> list[float]:
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
    return clock.stamps
