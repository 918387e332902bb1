"""Time of GPU work without launch gaps: a CUDA graph of calls over rotating weights, replayed, timed by events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median, and the distance between two measurements as a share of it."""

    microseconds: float
    spread: float


def graphed(calls: Sequence[Callable[[], object]], repeats: int = 2) -> Timing | None:
    """Each call works on its own weights, so that none finds them in L2. None without a GPU: each runs once."""
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return None
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return _twice(graph.replay, len(calls) * repeats)


def streamed(calls: Sequence[Callable[[], object]]) -> Timing | None:
    """For what cannot be captured, because it waits for the host: wall time of eager calls between two events."""
    for call in calls:
        call()
    if not torch.cuda.is_available():
        return None

    def all_of_them() -> None:
        for call in calls:
            call()

    return _twice(all_of_them, len(calls))


def _twice(work: Callable[[], object], calls: int) -> Timing:
    first, second = _median(work, calls), _median(work, calls)
    return Timing(min(first, second), abs(first - second) / min(first, second))


def _median(work: Callable[[], object], calls: int, milliseconds: float = 60.0) -> float:
    """Microseconds a call, median over as many runs of `work` as fit the time."""
    once = _elapsed(work)
    runs = max(5, min(200, int(milliseconds / max(once, 1e-3))))
    return statistics.median(_elapsed(work) for _ in range(runs)) * 1e3 / calls


def _elapsed(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copy_bandwidth(gigabytes: float = 2.0) -> float | None:
    """Bytes a second of a device-to-device copy, read plus written; the ceiling that shares refer to."""
    if not torch.cuda.is_available():
        return None
    source = torch.randint(0, 255, (int(gigabytes * 2**30),), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    microseconds = _median(lambda: target.copy_(source), 1, milliseconds=150)
    return 2 * source.numel() / (microseconds * 1e-6)
