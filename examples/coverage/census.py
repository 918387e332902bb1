"""`python -m examples.coverage.census [NAMES]`: a row for every architecture, and the tables made of them.

Processes are forked from a server that has torch and transformers loaded, so a row costs its checks and not imports.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.coverage.architectures import entries
from examples.coverage.examine import Row, examine
from examples.coverage.lacking import summary_lines, unexplained
from examples.coverage.page import write_table
from ltepass.cli.output_and_errors import AsJson, show
from ltepass.cli.typer_app import run_command
from ltepass.errors import ConfigError
from ltepass.progress import tell

TIMEOUT_S = 180.0
MEMORY_BYTES = 8 << 30  # address space of one check; torch alone maps about 2 GB
PRELOAD = ("examples.coverage.preload",)


def take_census(
    names: Sequence[str] = (), jobs: int = 1, timeout: float = TIMEOUT_S, memory: int = MEMORY_BYTES
) -> Iterator[Row]:
    """Rows as they are finished; all architectures without names. Raises ConfigError for a name that is none."""
    known = list(entries())
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no causal LM of transformers and no family of the census; expected names such as "
            f"{', '.join(known[:3])}; examples/results/coverage.csv has all {len(known)}"
        )
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    todo = list(names or known)[::-1]
    total = len(todo)
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while todo or running:
            tell("architectures", total - len(todo) - len(running), total)
            while todo and len(running) < jobs:
                name = todo.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_examine_alone, args=(name, theirs, memory), daemon=True)
                process.start()
                theirs.close()
                running[ours] = name, process, time.monotonic() + timeout
            yield from _finished(running, timeout)
    finally:
        tell("architectures", total, total)
        for _, process, _ in running.values():
            process.kill()


def _finished(running: dict[Connection, tuple[str, Any, float]], timeout: float) -> Iterator[Row]:
    """Rows of the processes that ended, or whose time ended, since the last call."""
    now = time.monotonic()
    first_end = min(end for _, _, end in running.values())
    ready = wait(list(running), timeout=max(0.0, first_end - now))
    late = [pipe for pipe, (_, _, end) in running.items() if pipe not in ready and end <= time.monotonic()]
    for pipe in [*ready, *late]:
        assert isinstance(pipe, Connection)
        name, process, _ = running.pop(pipe)
        row = Row(name=name, status="stopped", detail=f"not done after {timeout:.0f} s", seconds=timeout)
        if pipe in ready:
            try:
                row = pipe.recv()
            except EOFError:
                process.join()
                row = Row(name=name, status="stopped", detail=f"the process ended with exit code {process.exitcode}")
        process.kill()
        process.join()
        pipe.close()
        yield row


def _examine_alone(name: str, pipe: Connection, memory: int) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    pipe.send(examine(name, entries()[name]))
    pipe.close()


def line_of(row: Row) -> str:
    """One line of progress: what was captured and found, both errors, the time, and what is lacking."""
    found = f"{row.graphs} graphs, {row.sites} sites" if row.status == "ok" else row.status
    dense = "" if row.dense_error is None else f"dense {row.dense_error:.0e}"
    lowered = "" if row.lowered_error is None else f"lowered {row.lowered}: {row.lowered_error:.0e}"
    lacking = (row.unfound and f"not found: {row.unfound}", row.detail, row.kept, row.refusals)
    return f"{row.name:26} {found:20} {dense:12} {lowered:18} {row.seconds:5.1f} s  {'; '.join(filter(None, lacking))}"


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Model types or families; every causal LM and family if none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where coverage.csv and coverage.md go.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time, one thread each.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds that one architecture may take.")] = TIMEOUT_S,
    json: AsJson = False,
) -> None:
    """Transform, gate and lower a tiny model of every architecture, and compare what each computes."""
    rows = []
    for row in take_census(names or (), jobs=jobs, timeout=timeout):
        typer.echo(line_of(row), err=json)
        rows.append(row)
        if out is not None:
            write_table(rows, out)  # after each: a run that is stopped keeps what it has
    for line in summary_lines(rows):
        typer.echo(line, err=json)
    lacking = {row.name: missing for row in rows if (missing := unexplained(row))}
    for name, missing in lacking.items():
        typer.echo(f"{name}: no reason is known for {', '.join(missing)}", err=True)
    if json:
        show({"rows": rows, "unexplained": lacking}, json=True)
    if lacking:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(main)
