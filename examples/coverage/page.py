"""coverage.csv and coverage.md, from the census' rows."""

from __future__ import annotations

import ast
import csv
import importlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from examples.coverage.architectures import entries
from examples.coverage.examine import Row
from examples.coverage.known_reasons import CHECKS
from examples.coverage.lacking import is_causal_lm, remark, summary_lines, why_unfound


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
