"""`python -m examples.bench.shared_cores`: a token on two threads, alone and beside a process that keeps one core busy.

SmolLM2-135M's shape with random weights: ours (every linear lowered), torch's own and llama.cpp, each in a process of
its own, in turns. Our int8 weights need torchao, llama.cpp llama-cpp-python: what is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltepass.measure import gguf_file
from ltepass.measure.bench_tokens import COLD
from ltepass.measure.processes import Seat, Worker, workers
from ltepass.measure.records import Environment, append
from ltepass.measure.sides.llama_cpp_side import LlamaCpp
from ltepass.measure.sides.side import Side
from ltepass.measure.sides.transformers_side import Transformers
from ltepass.measure.timing import Timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 32  # tokens
BUSY_CORE = 1
STARTS = 0.3  # seconds that the busy process gets to do so


@dataclass(frozen=True, kw_only=True)
class SharedRecord(Environment):
    """One side, alone or beside busy processes. slower: its median over the one alone; likewise slower_p99."""

    side: str
    format: str
    busy: int
    tokens: int
    ms: float
    p99_ms: float
    slower: float
    slower_p99: float


def model(layers: int = 30) -> PreTrainedModel:
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def sides(load: partial[PreTrainedModel], scratch: Path) -> dict[str, Side]:
    """By name and format of the weights."""
    found: dict[str, Side] = {"ltepass, F32": Transformers(load=load, routed=False, lowered=True)}
    if importlib.util.find_spec("torchao"):
        found["ltepass, int8"] = Transformers(load=load, routed=False, lowered=True, quantised="int8")
    found["torch, F32"] = Transformers(load=load, routed=False)
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        for format in ("F32", "Q8_0"):
            gguf_file.write(load(), scratch / f"{format}.gguf", format)
            found[f"llama.cpp, {format}"] = LlamaCpp(path=scratch / f"{format}.gguf")
    return found


@contextmanager
def busy(core: int | None) -> Iterator[None]:
    """A process that takes all it gets of this core, until the end."""
    if core is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(process.pid, {core})
        time.sleep(STARTS)
        yield
    finally:
        process.kill()
        process.wait()


def measure(
    names: Sequence[str], opened: Sequence[Worker], tokens: int, rounds: int, threads: int
) -> list[SharedRecord]:
    ids = torch.randint(0, 49152, (PROMPT + tokens,), generator=torch.Generator().manual_seed(0))
    call = partial(Seat.times, prompt=ids[:PROMPT], tokens=ids[PROMPT:])
    taken: dict[tuple[str, int], list[float]] = {(name, n): [] for name in names for n in (0, 1)}
    for turn in range(1 + rounds):  # the first is not counted
        for name, worker in zip(names, opened, strict=True):
            for n, core in enumerate((None, BUSY_CORE)):
                with busy(core):
                    times = worker.ask(call)
                taken[name, n] += times[COLD:] if turn else []
    size, seconds = opened[0].ask(Seat.read_pass)
    run, flops = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}", opened[0].ask(Seat.gemm_rate)
    here = replace(Environment.here(run, bandwidth=size / seconds, flops=flops), threads=threads)
    return [_record(here, name, n, taken) for name, n in taken]


def _record(here: Environment, name: str, n: int, taken: dict[tuple[str, int], list[float]]) -> SharedRecord:
    timing, alone = Timing.of(taken[name, n]), Timing.of(taken[name, 0])
    side, _, format = name.partition(", ")
    return SharedRecord(
        **vars(here),
        side=side,
        format=format,
        busy=n,
        tokens=timing.repeats,
        ms=1e3 * timing.median,
        p99_ms=1e3 * timing.p99,
        slower=timing.median / alone.median,
        slower_p99=timing.p99 / alone.p99,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("lte-bench/shared_cores.csv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = sides(partial(model, args.layers), Path(scratch))
        with workers(list(found.values()), threads=args.threads, length=PROMPT + args.tokens) as opened:
            records = measure(list(found), opened, tokens=args.tokens, rounds=args.rounds, threads=args.threads)
    append(args.out, records)
    print("| side | weights | busy processes | ms a token | p99 | times alone |\n|---|---|---|---|---|---|")
    for r in records:
        slower = f"{r.slower:.2f} (p99 {r.slower_p99:.2f})"
        print(f"| {r.side} | {r.format} | {r.busy} | {r.ms:.1f} | {r.p99_ms:.1f} | {slower} |")


if __name__ == "__main__":
    main()
