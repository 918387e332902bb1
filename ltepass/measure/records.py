"""One measured time as one CSV row, with everything that a reader needs to judge it, and the file it is appended to."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ltepass.measure.machine import machine
from ltepass.version import __version__


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What was the same for every row of one run. run: its start, and the name that rows to be compared share."""

    run: str
    threads: int
    bandwidth_gbs: float  # of reading cold memory, measured in this run
    gflops: float  # of torch.mm on large fp32 matrices, measured in this run
    machine: str = ""
    torch: str = torch.__version__
    python: str = platform.python_version()
    ltepass: str = ""

    @staticmethod
    def here(run: str, *, bandwidth: float, flops: float) -> Environment:
        return Environment(
            run=run,
            threads=torch.get_num_threads(),
            bandwidth_gbs=round(bandwidth / 1e9, 2),
            gflops=round(flops / 1e9, 1),
            machine=machine(),
            ltepass=__version__,
        )


@dataclass(frozen=True, kw_only=True)
class OpRecord(Environment):
    """One FFN, one contender. sparsity: of each token; union: share of experts that at least one token uses.

    byte_ideal_ms: weights and router that are used, read once at the measured bandwidth; bound_ms: that, or the
    arithmetic at the measured rate, whichever takes longer. path: what the op says it chose; empty for a baseline.
    """

    case: str
    contender: str
    tokens: int
    d_model: int
    d_ff: int
    group_size: int
    gated: bool
    dtype: str
    sparsity: float
    union: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    byte_ideal_ms: float
    share_of_byte_ideal: float
    bound_ms: float
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenRecord(Environment):
    """One token of one side: a program, a format of the weights, a sparsity.

    bandwidth_gbs: here, of reading the weights of a side of ours in their order of use, and nothing else.
    byte_ideal_ms: weight_mb and kv_mb at that speed. Megabytes are 10^6 bytes.
    """

    model: str
    side: str  # the program
    how: str  # what runs a token: eager or compiled, and which calls; of llama.cpp, what it was compiled for
    format: str  # of the matrices
    head: str  # format of the head
    sparsity: float  # asked for; 0: every neuron
    active: float  # share of neurons that the timed tokens used
    router: str  # empty: none
    router_share: float  # its bytes over those of the FFNs
    group_size: int
    tokens: int  # timed
    ms: float
    p20_ms: float
    p80_ms: float
    p99_ms: float
    prefill_tokens: int
    prefill_ms: float
    perplexity: float  # NaN where none was asked for
    weight_mb: float  # read by a token
    kv_mb: float  # read by the token in the middle
    resident_mb: float  # of the process, above what it was after its imports
    peak_mb: float  # the same, at most, from loading on
    gbs: float  # weight_mb and kv_mb over ms
    byte_ideal_ms: float
    share_of_byte_ideal: float
    load_s: float = math.nan  # from a folder, after the imports; older rows have none
    memory_over_weights: float = math.nan  # peak_mb without keys and values, over the weights held
    prompt_tokens: int = 64  # before the first timed one


R = TypeVar("R", bound=Environment)


def append(path: Path, records: Iterable[Environment]) -> None:
    """Adds rows below those of earlier runs; makes the file, with its heading, where there is none."""
    rows = [{name: _text(value) for name, value in asdict(record).items()} for record in records]
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path, kind: type[R]) -> list[R]:
    """All rows of a file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    types = {field.name: str(field.type) for field in fields(kind)}
    with path.open(newline="") as file:
        return [kind(**{name: _value(text, types[name]) for name, text in row.items()}) for row in csv.DictReader(file)]


def _value(text: str, kind: str) -> Any:
    return text == "True" if kind == "bool" else {"int": int, "float": float, "str": str}[kind](text)
