"""Timing that a sceptic accepts: contenders interleaved, caches emptied before every call, medians with p20 and p80.

Of a call (`interleaved`), of each token of models that take turns in one process (`time_decoding`), and of those of
`generate` (`time_generate`).
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from ltepass.measure.machine import last_level_cache
from ltepass.routed.sites import FFNSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Contender = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call over `repeats` calls."""

    median: float
    p20: float
    p80: float
    p99: float
    repeats: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        s = sorted(seconds)
        at = lambda q: s[min(len(s) - 1, int(q * len(s)))]  # noqa: E731 -- three uses, one line
        return Timing(median=at(0.5), p20=at(0.2), p80=at(0.8), p99=at(0.99), repeats=len(s))


class Flush:
    """Reads twice the last-level cache on every thread, so that what follows finds nothing of its weights there."""

    def __init__(self) -> None:
        self._buffer = torch.ones(2 * last_level_cache() // 4)

    def __call__(self) -> None:
        self._buffer.sum()


def copies_needed(touched_bytes: float, n_contenders: int) -> int:
    """How many copies of the weights keep every call cold: enough to push a copy out of the cache before it comes up
    again, or one for each contender of a turn (the caches are emptied between turns)."""
    return max(2, min(n_contenders + 1, math.ceil(3 * last_level_cache() / touched_bytes)))


Name = TypeVar("Name", bound=Hashable)
WARM_UP = 2  # turns
LONG = 1.0  # seconds


def interleaved(
    contenders: Mapping[Name, Contender], *, seconds: float = 10.0, min_repeats: int = 15, max_repeats: int = 200
) -> dict[Name, Timing]:
    """Times all contenders turn by turn, so that a slow spell of the machine hits each of them alike.

    A contender takes the number of the copy of the weights to use. A turn begins with emptied caches and one untimed
    call, since emptying them also threw out the interpreter's and torch's own code, which a running model keeps
    there. seconds: rough time to spend in all. The first two turns count for calls above a second only, which no
    warm-up decides. A contender that alone has used up `seconds` sits out.
    """
    flush = Flush()
    taken: dict[Name, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for turn in range(max_repeats + WARM_UP):
        if turn >= min_repeats + WARM_UP and time.perf_counter() - start > seconds:
            break
        going = [name for name in contenders if sum(taken[name]) <= seconds]
        if not going:
            break
        flush()
        first = going[0]
        if max(taken[first], default=0.0) <= LONG:
            contenders[first](turn + len(contenders))
        for i, name in enumerate(going):
            t0 = time.perf_counter()
            contenders[name](turn + i)
            t = time.perf_counter() - t0
            if turn >= WARM_UP or t > LONG:
                taken[name].append(t)
    return {name: Timing.of(s) for name, s in taken.items()}


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
    """Seconds that each token took in `generate`, the first of which comes out of the prompt. prompt: [P], tokens: [N]
    int64.
    """
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
