"""`python -m examples.bench.op [CASES]`: one case, every contender in turns, one record each."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.bench import ways
from examples.bench.op_cases import CALL, CASES, CODED_SPARSITIES, SPARSITIES, Case
from examples.bench.sparse_codes import NAMES, sparse_codes
from examples.bench.table import describe, op_table
from examples.bench.ways import Shape
from ltepass.cli.output_and_errors import AsJson, show
from ltepass.cli.typer_app import run_command
from ltepass.errors import ConfigError
from ltepass.kernels.cpu.which_path import which_path
from ltepass.measure.machine import gemm_rate, plain_reads
from ltepass.measure.records import Environment, OpRecord, append, read
from ltepass.measure.timing import Contender, copies_needed, interleaved
from ltepass.progress import steps

ROUTED = "routed"
CODED_TOKENS = 32  # at most: rounding keeps the decisions that a router was made for
BITS = {"sparse int8": 8, "sparse int4": 4.5}  # of a weight, with the scales of blocks
READ = "plain read"
UPCAST_TOKENS = 16  # below, widening the weights costs more than it saves


def cases_named(patterns: Sequence[str] | None, threads: int | None) -> list[Case]:
    """Those whose names match. Raises ConfigError where none does."""
    chosen = [
        case
        for case in CASES
        if (threads is None or case.threads == threads) and any(fnmatch(case.name, p) for p in patterns or ["*"])
    ]
    if not chosen:
        raise ConfigError(
            f"no case matches {' '.join(patterns or [])!r} on {threads} threads; see ltepass bench op --list"
        )
    return chosen


def bench(
    chosen: Sequence[Case], *, seconds: float, repeats: int, out: Path, plot: Path | None = None
) -> list[OpRecord]:
    """Times the cases one by one, each appended to the CSV `out` when it is done."""
    done: list[OpRecord] = []
    for case in steps("cases", chosen):
        records = measure(case, seconds=seconds, min_repeats=repeats)
        append(out, records)
        done += records
    if plot is not None:
        from examples.bench.plot import draw

        draw(plot, read(out, OpRecord))
    return done


def measure(
    case: Case, *, seconds: float = 20.0, min_repeats: int = 15, sparsities: Sequence[float] = SPARSITIES
) -> list[OpRecord]:
    """Times one case on its own thread count; all records share their `run`. seconds: rough time of the turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.no_grad():
            return _measure(case, seconds, min_repeats, sparsities)
    finally:
        torch.set_num_threads(before)


def _measure(case: Case, seconds: float, min_repeats: int, sparsities: Sequence[float]) -> list[OpRecord]:
    shape = case.shape
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    contenders = make_contenders(case, sparsities)
    reads, size = plain_reads()
    before = gemm_rate()
    # Plain reads take turns like everything else: a machine's memory can be twice as fast a minute later.
    turns = contenders | {(READ, way): read for way, read in reads.items()}
    taken = interleaved(turns, seconds=seconds, min_repeats=min_repeats)
    bandwidth = size / min(taken[READ, way].median for way in reads)
    environment = Environment.here(run, bandwidth=bandwidth, flops=max(before, gemm_rate()))
    timings = {key: taken[key] for key in contenders}
    path = which_path(shape.tokens, shape.d_model, shape.d_ff, shape.n_experts, shape.dtype)
    records = []
    for (name, sparsity), timing in timings.items():
        routed = name == ROUTED
        union = union_share(shape, sparsity)
        ideal = bytes_read(name, shape, sparsity, union) / (environment.bandwidth_gbs * 1e9)
        flops = 0.0 if name == CALL else 2 * shape.tokens * shape.weight_bytes / shape.dtype.itemsize * (1 - sparsity)
        records.append(
            OpRecord(
                **vars(environment),
                case=case.name,
                contender=name,
                tokens=shape.tokens,
                d_model=shape.d_model,
                d_ff=shape.d_ff,
                group_size=shape.group_size,
                gated=shape.gated,
                dtype=str(shape.dtype).removeprefix("torch."),
                sparsity=sparsity,
                union=union,
                median_ms=1e3 * timing.median,
                p20_ms=1e3 * timing.p20,
                p80_ms=1e3 * timing.p80,
                repeats=timing.repeats,
                byte_ideal_ms=1e3 * ideal,
                share_of_byte_ideal=ideal / timing.median,
                bound_ms=1e3 * max(ideal, flops / (environment.gflops * 1e9)),
                path=path if routed else "",
            )
        )
    return records


def bytes_read(contender: str, shape: Shape, sparsity: float, union: float) -> float:
    """Weight bytes that a contender cannot do without. CATS reads the whole gate, then a share of up and down."""
    if contender in NAMES:
        bits = BITS[contender]
        return union * shape.weight_bytes / shape.dtype.itemsize * bits / 8 + shape.n_experts * shape.d_model
    shares = {ROUTED: union + shape.router_share, "gate-first": (1 + 2 * (1 - sparsity)) / 3, CALL: 0.0}
    return shares.get(contender, 1 - sparsity) * shape.weight_bytes


def union_share(shape: Shape, sparsity: float) -> float:
    """Share of the experts that at least one token of the case chooses."""
    return ways.decide(shape, sparsity).active.any(0).float().mean().item()


def make_contenders(case: Case, sparsities: Sequence[float]) -> dict[tuple[str, float], Contender]:
    """By name and sparsity. Dense ones have sparsity 0."""
    shape = case.shape
    some = [s for s in sparsities if s < 1]
    coded = [(name, s) for name in NAMES for s in CODED_SPARSITIES if shape.tokens <= CODED_TOKENS]
    least = min([shape.weight_bytes * (1 - max(some)), *(bytes_read(name, shape, s, 1 - s) for name, s in coded)])
    weights = ways.make_weights(shape, copies_needed(least, len(sparsities) + 2))
    out: dict[tuple[str, float], Contender] = {("dense eager", 0.0): ways.dense_eager(shape, weights)}
    if case.compiled:
        out["dense compiled", 0.0] = ways.dense_compiled(shape, weights)
    if shape.dtype == torch.bfloat16 and shape.tokens >= UPCAST_TOKENS:
        out["dense upcast", 0.0] = ways.dense_upcast(shape, weights)
    out |= {(ROUTED, s): ways.routed(shape, weights, s) for s in sparsities}
    out |= {(name, s): sparse_codes(name, shape, weights, s) for name, s in coded}
    if shape.tokens == 1:
        out[CALL, 0.0] = ways.call_alone()
    if case.peers:
        turned = ways.turned_weights(weights)
        for s in (s for s in some if s >= 0.5):
            out["index_select", s] = ways.index_select(shape, weights, s)
            out["gate-first", s] = ways.gate_first(shape, weights, s)
            out["single neurons", s] = ways.single_neurons(shape, turned, s)
    return out


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="Names or patterns such as '7b-*'; all if none.")] = None,
    threads: Annotated[int | None, typer.Option(help="Only cases for this number of threads.")] = None,
    seconds: Annotated[float, typer.Option(help="Rough time of the turns of each case.")] = 20.0,
    repeats: Annotated[int, typer.Option(help="Turns at least.")] = 15,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("lte-bench/op.csv"),
    plot: Annotated[Path | None, typer.Option(help="An SVG of everything in OUT: time against sparsity.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
    json: AsJson = False,
) -> None:
    """Time the sparse op against dense and against other ways to skip neurons; appends to a CSV."""
    chosen = cases_named(cases, threads)
    if only_list:
        names = {case.name: describe(case.name) for case in chosen}
        show({"cases": names} if json else "\n".join(f"{name}: {what}" for name, what in names.items()), json=json)
        return
    records = bench(chosen, seconds=seconds, repeats=repeats, out=out, plot=plot)
    show({"rows": records} if json else op_table(records), json=json)


if __name__ == "__main__":
    run_command(main)
