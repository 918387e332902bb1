"""`python -m examples.bench.token_profile FOLDER ...`: where a token of an exported model goes.

In our ops, beside reading their weights at the memory's speed; in attention; and in all between them: the compiled
graph, its calls of the ops, Python. The ops' times are the profiler's, the token's are taken without it, in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.kernels.read_pass import read_pass
from ltepass.measure.machine import gemm_rate
from ltepass.measure.records import Environment, append

CSV = Path("examples/results/token_profile.csv")
PROMPT, WARM_UP = 64, 8  # tokens
ATTENTION = "ltepass::cached_attention"


@dataclass(frozen=True, kw_only=True)
class ProfileRecord(Environment):
    """Medians of one token, in ms. reading_ms: of its weights, at the bandwidth of reading them; nan with routers.

    weights_ms: in the ops that read weights; attention_ms: in attention; between_ms: what is left. calls: of ops.
    """

    folder: str
    tokens: int
    calls: int
    ms: float
    reading_ms: float
    weights_ms: float
    attention_ms: float
    between_ms: float


def profiled(folder: Path, *, threads: int, tokens: int, rounds: int, run: str) -> ProfileRecord:
    torch.set_num_threads(threads)
    decoder = ExportedDecoder(folder)
    size = sum(tensor.nbytes for tensor in decoder.weights)
    whole, speeds, weights, attention = list[float](), list[float](), list[float](), list[float]()
    calls = 0
    for _ in range(rounds):
        _begin(decoder)
        whole += [_seconds(lambda: decoder([1])) for _ in range(tokens)]
        _begin(decoder)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(tokens):
                decoder([1])
        ops = [event for event in seen.events() or () if event.name.startswith("ltepass::")]
        calls = len(ops) // tokens
        attending = sum(event.cpu_time_total for event in ops if event.name == ATTENTION) / 1e3
        attention.append(attending / tokens)
        weights.append((sum(event.cpu_time_total for event in ops) / 1e3 - attending) / tokens)
        speeds.append(size / _seconds(lambda: read_pass(decoder.weights)))
    here = Environment.here(run, bandwidth=statistics.median(speeds), flops=gemm_rate())
    about = decoder.about
    ms = 1e3 * statistics.median(whole)
    in_weights, in_attention = statistics.median(weights), statistics.median(attention)
    return ProfileRecord(
        **vars(here),
        folder=f"{folder.resolve().parent.name}/{folder.name}",
        tokens=len(whole),
        calls=calls,
        ms=ms,
        reading_ms=math.nan if about.gated_bytes else about.token_bytes / 1e6 / here.bandwidth_gbs,
        weights_ms=in_weights,
        attention_ms=in_attention,
        between_ms=ms - in_weights - in_attention,
    )


def _begin(decoder: ExportedDecoder) -> None:
    decoder.reset()
    decoder([1] * PROMPT)
    for _ in range(WARM_UP):
        decoder([1])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def markdown(records: Sequence[ProfileRecord]) -> str:
    lines = ["| folder | threads | ms | reading | ops that read | attention | between | calls |", "|---" * 8 + "|"]
    for r in records:
        parts = (r.ms, r.reading_ms, r.weights_ms, r.attention_ms, r.between_ms)
        shown = " | ".join("-" if math.isnan(ms) else f"{ms:.2f}" for ms in parts)
        lines.append(f"| {r.folder} | {r.threads} | {shown} | {r.calls} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", type=Path, help="of `ltepass export`")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=CSV)
    asked = parser.parse_args(arguments)
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    records = [
        profiled(folder, threads=int(n), tokens=asked.tokens, rounds=asked.rounds, run=run)
        for n in asked.threads.split(",")
        for folder in asked.folder
    ]
    append(asked.out, records)
    print(markdown(records))


if __name__ == "__main__":
    main()
