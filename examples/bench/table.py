"""The targets against the latest run of every case: values, verdicts, and the tables of speed.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.bench import token_table
from examples.bench.old_rows import ModelRecord
from examples.bench.op_cases import BASELINES, CALL, CASES, STOCK, TARGETS, Target
from examples.bench.token_table import NOT_MEASURED
from ltepass.commands.bench_tables import threads_of
from ltepass.measure.records import OpRecord, TokenRecord


@dataclass(frozen=True, kw_only=True)
class Value:
    """One measured ratio. ceiling: what the ratio would be at the run's own bandwidth and arithmetic rate."""

    value: float
    ceiling: float
    target: float

    @property
    def met(self) -> bool:
        return round(self.value, 2) >= self.target


def latest(records: Iterable[OpRecord]) -> dict[str, list[OpRecord]]:
    """The rows of the newest run of each case."""
    by_case: dict[str, dict[str, list[OpRecord]]] = {}
    for record in records:
        by_case.setdefault(record.case, {}).setdefault(record.run, []).append(record)
    return {case: runs[max(runs)] for case, runs in by_case.items()}


def judge(target: Target, run: Sequence[OpRecord]) -> list[Value | None]:
    """One value for each sparsity of the target, None where it was not measured. run: of one case."""
    rows = {(r.contender, r.sparsity): r for r in run}
    dense = [rows[name, 0.0] for name in BASELINES[target.over] if (name, 0.0) in rows]
    return [
        _value(target, min(dense, key=lambda r: r.median_ms, default=None), rows.get(("routed", s)), t)
        for s, t in zip(target.at, target.values, strict=True)
    ]


def _value(target: Target, dense: OpRecord | None, ours: OpRecord | None, goal: float) -> Value | None:
    if dense is None or ours is None:
        return None
    ideal = dense.byte_ideal_ms / ours.byte_ideal_ms if target.of_ideal else 1.0
    return Value(
        value=dense.median_ms / ours.median_ms / ideal, ceiling=dense.median_ms / ours.bound_ms / ideal, target=goal
    )


def op_table(records: Sequence[OpRecord]) -> Any:
    """A rich table for the terminal: every contender of the newest run of every case."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for heading in (
        "case",
        "contender",
        "sparsity",
        "ms",
        "p20 .. p80",
        "over best stock",
        "of byte ideal",
        "bound, ms",
    ):
        name = heading in ("case", "contender")  # these give way where the terminal is narrow
        table.add_column(heading, justify="left" if name else "right", overflow="fold", min_width=8 if name else 6)
    for case, run in latest(records).items():
        dense = min((r.median_ms for r in run if r.contender in STOCK), default=float("nan"))
        for r in run:
            table.add_row(
                case,
                r.contender,
                f"{r.sparsity:.0%}",
                f"{r.median_ms:.3f}",
                f"{r.p20_ms:.3f} .. {r.p80_ms:.3f}",
                f"{dense / r.median_ms:.2f}x",
                f"{r.share_of_byte_ideal:.0%}",
                f"{r.bound_ms:.3f}",
            )
        table.add_section()
    return table


def markdown(
    op_records: Sequence[OpRecord], token_records: Sequence[TokenRecord], old_records: Sequence[ModelRecord] = ()
) -> str:
    """The section of speed.md: one table for the op, then whole tokens, and where they were measured."""
    runs = latest(op_records)
    tokens = [token_table.markdown(token_records), *(["", token_table.old_table(old_records)] if old_records else [])]
    return "\n".join([_op_table(runs), "", *_notes(runs), "", *_profile_table(runs), *tokens])


def _op_table(runs: dict[str, list[OpRecord]]) -> str:
    lines = [
        "| FFN alone | over | case | target | measured | ceiling of the run | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        judged = {case: judge(target, runs.get(case, [])) for case in target.cases}
        if target.worst:
            lines.append(_row(target, *_worst(judged)))
        else:
            lines += [_row(target, describe(case), values) for case, values in judged.items()]
    return "\n".join(lines)


def _profile_table(runs: dict[str, list[OpRecord]]) -> list[str]:
    """Where the time of rows below their targets goes: what a call takes without experts, and what the rest reads."""
    lines = [
        "| below the target | the op, ms | no expert active, ms | expert weights read, MB | GB/s of the difference "
        "| GB/s of a plain read in that run | the baseline, ms, GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    empty = len(lines)
    for target in TARGETS:
        for case in target.cases:
            values = judge(target, runs.get(case, []))
            missed = [s for s, v in zip(target.at, values, strict=True) if v is not None and not v.met]
            lines += [_profile_row(target, case, runs[case], s) for s in missed]
    return [*lines, ""] if len(lines) > empty else []


def _profile_row(target: Target, case: str, run: Sequence[OpRecord], sparsity: float) -> str:
    rows = {(r.contender, r.sparsity): r for r in run}
    ours, idle = rows["routed", sparsity], rows.get(("routed", 1.0))
    baseline = min((r for r in run if r.contender in BASELINES[target.over] and r.sparsity == 0), key=_median)
    shape = next(c for c in CASES if c.name == case).shape
    read = ours.union * shape.weight_bytes / 1e6  # MB; a millisecond for each is one GB/s
    cells = (
        f"{describe(case)}, {sparsity:.0%} ({ours.union:.0%} of the experts)",
        f"{ours.median_ms:.2f}",
        f"{idle.median_ms:.2f}" if idle else NOT_MEASURED,
        f"{read:.1f}",
        f"{read / (ours.median_ms - idle.median_ms):.1f}" if idle else NOT_MEASURED,
        f"{ours.bandwidth_gbs:.1f}",
        f"{baseline.median_ms:.2f}, {shape.weight_bytes / 1e6 / baseline.median_ms:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _median(record: OpRecord) -> float:
    return record.median_ms


def _row(target: Target, case: str, values: Sequence[Value | None]) -> str:
    unit = "" if target.of_ideal else "x"
    at = " / ".join(f"{s:.0%}" for s in target.at)
    goals = dict.fromkeys(target.values)
    met = [v.met for v in values if v is not None]
    cells = (
        f"{target.where}, at {at}",
        target.over,
        case,
        f">= {_all(target.values if len(goals) > 1 else goals)}{unit}",
        _all(v.value if v else None for v in values) + unit if met else NOT_MEASURED,
        _all(v.ceiling if v else None for v in values) + unit if met else NOT_MEASURED,
        NOT_MEASURED if len(met) < len(values) else "yes" if all(met) else "no",
    )
    return f"| {' | '.join(cells)} |"


def _worst(judged: dict[str, list[Value | None]]) -> tuple[str, list[Value | None]]:
    """The measured case with the least value, how many were measured, and the case's values."""
    measured = {case: [v.value for v in values if v is not None] for case, values in judged.items()}
    measured = {case: values for case, values in measured.items() if values}
    if not measured:
        return f"worst of {len(judged)}", next(iter(judged.values()))
    worst = min(measured, key=lambda case: min(measured[case]))
    missed = sum(any(v is not None and not v.met for v in values) for values in judged.values())
    counts = f"worst of {len(measured)} measured, {missed} below the target"
    return f"{describe(worst)} ({counts})", judged[worst]


def _all(values: Iterable[float | None]) -> str:
    return " / ".join("-" if v is None else f"{v:.2f}" for v in values)


def describe(case: str) -> str:
    """A case's shape, in words."""
    found = next(c for c in CASES if c.name == case)
    s = found.shape
    kind = "" if s.gated else " plain"
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[str(s.dtype).removeprefix("torch.")]
    return f"T={s.tokens}, {s.d_model} x {s.d_ff}{kind}, {dtype}, {threads_of(found.threads)}"


def _notes(runs: dict[str, list[OpRecord]]) -> list[str]:
    measured = [r for run in runs.values() for r in run]
    if not measured:
        return []
    machines = ", ".join(dict.fromkeys(f"{r.machine}, torch {r.torch}, Python {r.python}" for r in measured))
    by_threads = {
        n: sorted(r.bandwidth_gbs for r in measured if r.threads == n) for n in sorted({r.threads for r in measured})
    }
    speeds = "; ".join(f"{v[0]:.0f}-{v[-1]:.0f} GB/s read on {threads_of(n)}" for n, v in by_threads.items())
    notes = [f"Measured on {machines}; {speeds}."]
    calls = sorted(1e3 * r.median_ms for r in measured if r.contender == CALL)
    if calls:
        notes[0] += (
            f" Rows of one token include the call, {calls[0]:.0f}-{calls[-1]:.0f} us before a weight is read (an "
            "FFN of 64 x 128 in the same turns): reading weights empties the caches of code too."
        )
    return notes
