"""Whole tokens against their targets, for speed.md: the newest run of each model and number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from examples.bench.old_rows import ModelRecord
from ltepass.commands.bench_tables import threads_of
from ltepass.measure.records import TokenRecord

NOT_MEASURED = "not measured"
OURS = ("ltepass, dense", "ltepass", "ltepass, exported")
THEIRS = {"int8": "Q8_0", "int4": "Q4_0", "int4_minimum": "Q4_1"}  # llama.cpp's format of as many bits
# Of ours, by format and sparsity: share of the byte ideal, and llama.cpp's dense token in the same format over it.
TARGETS: dict[tuple[str, float], tuple[float | None, float]] = {
    ("F32", 0.0): (0.75, 1.15),
    ("BF16", 0.0): (0.70, 1.15),
    ("int8", 0.0): (0.50, 1.15),
    ("int8", 0.5): (None, 1.25),
    ("int4", 0.0): (0.40, 1.15),
    ("int4_minimum", 0.0): (0.40, 1.15),
    ("F32", 0.5): (0.70, 1.4),
    ("BF16", 0.5): (0.60, 1.4),
    ("F32", 0.8): (0.60, 1.7),
    ("BF16", 0.8): (0.50, 1.7),
}
COLUMNS = (
    "side",
    "format",
    "sparsity",
    "perplexity",
    "ms (p99)",
    "MB read, GB/s",
    "of the byte ideal (target)",
    "llama.cpp over it, and over its byte ideal (target)",
    "prefill, ms",
    "resident, MB",
    "over the weights",
    "load, s",
)


def latest(records: Iterable[TokenRecord]) -> list[list[TokenRecord]]:
    """The rows of the newest run of each model, number of threads and length of the prompt."""
    runs: dict[tuple[str, int, int], dict[str, list[TokenRecord]]] = {}
    for r in records:
        runs.setdefault((r.model, r.threads, r.prompt_tokens), {}).setdefault(r.run, []).append(r)
    return [by_run[max(by_run)] for by_run in runs.values()]


def markdown(records: Sequence[TokenRecord]) -> str:
    """A table a run, below a line that says where and how it was measured."""
    if not records:
        return f"Whole token against the byte ideal and llama.cpp: {NOT_MEASURED}."
    return "\n\n".join(_table(run) for run in latest(records))


def _table(run: Sequence[TokenRecord]) -> str:
    r = run[0]
    how = "; ".join(dict.fromkeys(f"{row.side}: {row.how}" for row in run))
    where = f"{r.model}, {threads_of(r.threads)}, after {r.prompt_tokens} tokens"
    head = f"Whole token, {where}, {r.bandwidth_gbs:.1f} GB/s of reading the weights alone; "
    head += f"{how}; {r.machine}, torch {r.torch}."
    lines = [head, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row, run))} |" for row in run)])


def _cells(row: TokenRecord, run: Sequence[TokenRecord]) -> tuple[str, ...]:
    share, over = TARGETS.get((row.format, row.sparsity), (None, None)) if row.side in OURS else (None, None)
    format = THEIRS.get(row.format, row.format)
    theirs = next((r.ms for r in run if r.side == "llama.cpp" and r.format == format), None)
    sparse = f"{row.sparsity:.0%} ({row.router}, experts of {row.group_size})" if row.router else "-"
    return (
        row.side + row.how.partition("greedy")[2],  # what its cache holds, where that is another format
        row.format if row.format == row.head else f"{row.format}, head {row.head}",
        sparse,
        "-" if math.isnan(row.perplexity) else f"{row.perplexity:.2f}",
        f"{row.ms:.2f} ({row.p99_ms:.2f})",
        f"{row.weight_mb + row.kv_mb:.0f}, {row.gbs:.1f}",
        f"{row.share_of_byte_ideal:.2f}{_target(share)}",
        "-" if theirs is None or row.side not in OURS else _ratio(theirs, row, over),
        f"{row.prefill_ms:.0f}",
        f"{row.resident_mb:.0f}",
        _known(row.memory_over_weights, "x"),
        _known(row.load_s),
    )


def _ratio(theirs: float, row: TokenRecord, goal: float | None) -> str:
    """How many times faster than llama.cpp's token of `theirs` ms, and how many it would be at the memory's speed."""
    return f"{theirs / row.ms:.2f}x of {theirs / row.byte_ideal_ms:.2f}x{_target(goal)}"


def _known(value: float, unit: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:.2f}{unit}"


def _target(goal: float | None) -> str:
    return "" if goal is None else f" ({goal:g})"


def old_table(records: Sequence[ModelRecord]) -> str:
    """What was measured without a byte ideal."""
    if not records:
        return ""
    lines = [
        "| whole token, `generate`, measured before | sparsity asked / measured | perplexity (every neuron on) "
        "| tokens/s dense | lowered | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for r in {(r.model, r.how, r.threads, r.sparsity): r for r in records}.values():
        cells = (
            f"{r.model}, experts of {r.group_size}, {r.dtype}, {r.how} on both sides, {threads_of(r.threads)}",
            f"{r.sparsity:.0%} / {1 - r.active:.1%}",
            f"{r.perplexity:.2f} ({r.perplexity_dense:.2f})",
            f"{1e3 / r.dense_ms:.1f}",
            f"{1e3 / r.lowered_ms:.1f}",
            f"{r.speedup:.2f}x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
