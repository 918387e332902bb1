"""Timing that a sceptic accepts: contenders interleaved, caches emptied before every call, medians with p20 and p80."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from ltepass.measure.machine import last_level_cache

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
