"""The time of each token: of sides that take turns in one process, and inside `model.generate`, fed given tokens."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from ltepass.routed.sites import FFNSite

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


@torch.no_grad()
def time_decoding(
    sides: Mapping[str, nn.Module], prompt: Tensor, tokens: Tensor, warmup: int = 8
) -> dict[str, list[float]]:
    """Seconds for each token of tokens [N], by side; each side keeps its own KV cache over prompt [P].

    The tokens are given, not sampled, so that every side does the same work; the order of the sides rotates, so that
    no side always runs after the same neighbour. The first `warmup` tokens are not returned.
    """
    caches = {name: model(input_ids=prompt[None], use_cache=True).past_key_values for name, model in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i, token in enumerate(tokens):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            _wait(prompt.device)
            start = time.perf_counter()
            out = sides[name](input_ids=token.view(1, 1), past_key_values=caches[name], use_cache=True)
            out.logits.argmax(-1).item()  # a user needs the token, and reading it waits for the device
            times[name].append(time.perf_counter() - start)
            caches[name] = out.past_key_values
    return {name: values[warmup:] for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_ffns(dense: nn.Module, sites: Sequence[FFNSite]) -> nn.Module:
    """A copy that shares every weight, each FFN replaced by identity. Sites must be aligned (`owner` is the FFN)."""
    assert all(site.kind == "aligned" for site in sites), "an inline FFN has no module of its own to replace"
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    bare = copy.deepcopy(dense, shared)
    for site in sites:
        bare.set_submodule(site.owner, nn.Identity())
    return bare


class Spread(TypedDict):
    """Quartiles."""

    median: float
    low: float
    high: float


class Summary(TypedDict):
    """By side: tokens_per_s, ms_per_token. The shares are active neurons, router bytes, and the FFNs' of dense time."""

    tokens_per_s: dict[str, Spread]
    ms_per_token: dict[str, float]
    speedup: float
    active_share: float
    router_share: float
    ffn_share_of_time: float
    tokens_timed: int


def summary(times: Mapping[str, Sequence[float]], active: float, router: float) -> Summary:
    """Medians and quartiles of tokens/s, and the speed-up. times: sides dense, lowered, bare."""
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "tokens_per_s": {name: _spread(values) for name, values in times.items()},
        "ms_per_token": {name: 1000 * value for name, value in median.items()},
        "speedup": median["dense"] / median["lowered"],
        "active_share": active,
        "router_share": router,
        "ffn_share_of_time": 1 - median["bare"] / median["dense"],
        "tokens_timed": len(times["dense"]),
    }


def _spread(seconds: Sequence[float]) -> Spread:
    slow, middle, fast = sorted(1 / q for q in statistics.quantiles(seconds, n=4))
    return {"median": middle, "low": slow, "high": fast}
