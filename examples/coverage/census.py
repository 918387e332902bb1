"""`python -m examples.coverage.census [NAMES]`: a row for every architecture, and the tables made of them.

Processes are forked from a server that has torch and transformers loaded, so a row costs its checks and not imports.
"""

from __future__ import annotations

import ast
import csv
import importlib
import platform
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.coverage.examine import Example, Row, examine
from examples.coverage.known_reasons import CHECKS, NO_DENSE_FFN, NOT_BUILT, PARTS, UNFOUND
from ltepass.cli.running import run_command
from ltepass.errors import ConfigError

TIMEOUT_S = 180.0
MEMORY_BYTES = 8 << 30  # address space of one check; torch alone maps about 2 GB
PRELOAD = ("examples.coverage.preload",)
WANTED_SHARE = 0.98


def entries() -> dict[str, Callable[[], Example]]:
    """Every architecture by name: transformers' causal LMs, then the other families."""
    from functools import partial

    from examples.coverage.zoo import causal_lm, causal_lms
    from examples.coverage.zoo_families import FAMILIES

    return {**{name: partial(causal_lm, name) for name in causal_lms()}, **FAMILIES}


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
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                name = todo.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_examine_alone, args=(name, theirs, memory), daemon=True)
                process.start()
                theirs.close()
                running[ours] = name, process, time.monotonic() + timeout
            yield from _finished(running, timeout)
    finally:
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


def is_causal_lm(row: Row) -> bool:
    from examples.coverage.zoo import causal_lms

    return row.name in causal_lms()


def remark(row: Row) -> str:
    """The sentence that justifies what a row lacks, from the committed list; "" where it lacks nothing."""
    if row.status in ("build", "stopped"):
        return NOT_BUILT.get(row.name, "")
    if row.status == "no dense FFN":
        return NO_DENSE_FFN
    return " ".join(dict.fromkeys(sentence for path in row.unfound.split() if (sentence := why_unfound(row, path))))


def why_unfound(row: Row, path: str) -> str:
    """Why a linear with an FFN's name is no site, from the committed list."""
    return next((why for part, why in UNFOUND.get(row.name, {}).items() if part in path), "")


def unexplained(row: Row) -> list[str]:
    """What a row lacks and the committed list has no sentence for: paths of linears, or the status."""
    if row.status not in ("ok", "no dense FFN"):
        return [] if remark(row) else [row.status]
    return [path for path in row.unfound.split() if not why_unfound(row, path)]


def dense_ffns_missed(row: Row) -> list[str]:
    """Paths of dense FFNs that are no sites: without those that are none in spite of their names."""
    return [path for path in row.unfound.split() if not why_unfound(row, path).startswith(PARTS)]


def summary(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The causal LMs by what became of them; the counts that the aim is about."""
    causal = [r for r in rows if is_causal_lm(r)]
    built = [r for r in causal if r.status not in ("build", "stopped")]
    dense = [r for r in built if r.sites or dense_ffns_missed(r)]
    complete = [r for r in dense if r.status == "ok" and not dense_ffns_missed(r)]
    return {
        "causal LMs": [r.name for r in causal],
        "instantiate and run": [r.name for r in built],
        "have a dense FFN": [r.name for r in dense],
        "get every one": [r.name for r in complete],
        "do not": [r.name for r in dense if r not in complete],
        "have none": [r.name for r in built if r not in dense],
        "do not instantiate": [r.name for r in causal if r not in built],
    }


def summary_lines(rows: Sequence[Row]) -> list[str]:
    groups = summary(rows)
    counts = {name: len(names) for name, names in groups.items()}
    dense, complete = counts["have a dense FFN"], counts["get every one"]
    lines = [
        f"{counts['causal LMs']} causal LMs; {counts['instantiate and run']} instantiate and run; of these {dense} "
        f"have a dense FFN, and {complete} ({complete / max(dense, 1):.1%}) get every one of them."
    ]
    for name in ("do not", "have none", "do not instantiate"):
        if groups[name]:
            lines.append(f"{name[0].upper()}{name[1:]}: {', '.join(groups[name])}.")
    return lines


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("torch", "transformers"):
        found[package] = importlib.import_module(package).__version__.partition("+")[0]
    return found


def _made_with() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def read_table(folder: Path) -> list[Row]:
    """The rows of a written coverage.csv."""
    texts = {f.name for f in fields(Row) if f.type == "str"}

    def value(name: str, text: str) -> Any:
        if name in texts:
            return text
        return ast.literal_eval(text) if text else None

    with (folder / "coverage.csv").open(newline="") as file:
        return [Row(**{k: value(k, v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write_table(rows: Iterable[Row], folder: Path) -> None:
    """coverage.csv with every field, coverage.md to read. Rows in the order of the architectures.

    Rows of a table that is there already stay where it was made with the same versions and has others.
    """
    page_file = folder / "coverage.md"
    same_versions = page_file.exists() and _made_with() in page_file.read_text()
    by_name = {r.name: r for r in [*(read_table(folder) if same_versions else ()), *rows]}
    rows = [by_name[name] for name in entries() if name in by_name]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "coverage.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
    page_file.write_text(page(rows))


def page(rows: Sequence[Row]) -> str:
    """coverage.md."""
    return "\n".join(_markdown(rows)) + "\n"


def _markdown(rows: Sequence[Row]) -> Iterator[str]:
    yield f"# Coverage\n\nWritten by `ltepass coverage --out examples/results` ({_made_with()}). Not to be edited.\n"
    yield (
        "Each row is a tiny random model in its own process. *dense*: largest difference of the transformed model in "
        "dense mode (neurons permuted) from the original, relative to the largest output. *lowered*: the same for the "
        "lowered model against hard mode in eager, after all decisions were compared and found equal. *named*: linears "
        "with a usual name of an FFN's second one, found and all.\n"
    )
    yield from (f"{line}\n" for line in summary_lines(rows))
    yield from _columns("causal LM", [r for r in rows if is_causal_lm(r)])
    yield from _columns("other family", [r for r in rows if not is_causal_lm(r)])
    yield "## What is left alone, and why\n\n| architecture | what | why |\n|---|---|---|"
    for row in rows:
        if row.status in ("build", "stopped"):
            yield f"| {row.name} | not built | {_cell(remark(row) or row.detail)} |"
        elif row.status not in ("ok", "no dense FFN"):
            yield f"| {row.name} | {row.status} | {_cell(row.detail)} |"
        by_reason: dict[str, list[str]] = {}
        for path in row.unfound.split():
            by_reason.setdefault(why_unfound(row, path), []).append(path)
        for why, paths in by_reason.items():
            yield f"| {row.name} | {_cell(', '.join(f'`{p}`' for p in paths))} | {_cell(why)} |"
    yield "\n## The checks that refuse a candidate\n\n| check | why it refuses |\n|---|---|"
    for check, why in CHECKS.items():
        yield f"| {check} | {_cell(why)} |"


def _columns(title: str, rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    headings = (title, "graphs", "nodes", "sites", "kind", "activation", "named", "refused", "dense", "lowered", "s")
    yield "| " + " | ".join(headings) + " |\n|" + "---|" * len(headings)
    for r in rows:
        found = f"{r.found}/{r.named}" if r.named else ""
        lowered = "" if r.lowered_error is None else f"{r.lowered}: {r.lowered_error:.0e}"
        cells = (r.name, r.graphs, r.nodes, r.sites if r.status == "ok" else r.status, r.kinds, r.activations, found)
        dense = "" if r.dense_error is None else f"{r.dense_error:.0e}"
        last = (_cell(r.refusals), dense, lowered or _cell(r.kept), f"{r.seconds:.0f}")
        yield "| " + " | ".join(map(str, (*cells, *last))) + " |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


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
) -> None:
    """Transform, gate and lower a tiny model of every architecture, and compare what each computes."""
    rows = []
    for row in take_census(names or (), jobs=jobs, timeout=timeout):
        typer.echo(line_of(row))
        rows.append(row)
        if out is not None:
            write_table(rows, out)  # after each: a run that is stopped keeps what it has
    for line in summary_lines(rows):
        typer.echo(line)
    lacking = {row.name: missing for row in rows if (missing := unexplained(row))}
    for name, missing in lacking.items():
        typer.echo(f"{name}: no reason is known for {', '.join(missing)}", err=True)
    if lacking:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(main)
