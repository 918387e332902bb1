"""README.md beside this file: what was written by hand, with the tables of the rows between two marks.

python -m examples.gallery.page
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from examples.gallery.rows import Row, read

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- tables: written by `python -m examples.gallery.page` -->", "<!-- end of tables -->"
ROUTERS = ("linear", "proxy")
NOVELTY = "AUROC"
UNPRUNED = ("pre-trained", "dense")  # columns of the table of pruning, beside each sparsity


def spread(rows: Sequence[Row], digits: int = 3) -> str:
    """The mean, and over several seeds the least and the largest."""
    values = [row.value for row in rows]
    if not values:
        return "not measured"
    digits = 1 if max(map(abs, values)) >= 100 else digits
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def task_table(rows: Sequence[Row]) -> list[str]:
    """Dense beside each router and sparsity, trained; a line for each model and metric of each example."""
    apart = of_pruning(rows) | of_retrieval(rows)
    rows = [row for row in rows if row.metric != NOVELTY and row.example not in apart]
    columns = [(router, target) for router in ROUTERS for target in (0.5, 0.8)]
    heads = [f"{router} {target:.0%}" for router, target in columns]
    table = [
        "| example | data | model | metric | beside | dense | " + " | ".join(heads) + " | lowered | seeds | s a seed |",
        "|---" * (9 + len(columns)) + "|",
    ]
    for key in dict.fromkeys((row.example, row.data, row.model, row.metric) for row in rows):
        mine = [row for row in rows if (row.example, row.data, row.model, row.metric) == key]
        example, data, model, metric = key
        others = [row for row in mine if row.side not in ("dense", *ROUTERS)]
        beside = f"{others[0].side}: {spread(others)}" if others else ""
        dense = [row for row in mine if row.side == "dense"]
        cells = [
            spread([row for row in mine if (row.side, row.target, row.stage) == (router, target, "trained")])
            if not dense[0].note
            else "refused"
            for router, target in columns
        ]
        seeds = {row.seed for row in mine}
        table.append(
            f"| [{example}]({example}.py) | {data} | {model} | {metric} | {beside} | {spread(dense)} | "
            f"{' | '.join(cells)} | {lowered(mine)} | {len(seeds)} | "
            f"{sum(row.seconds for row in mine) / len(seeds):.0f} |"
        )
    return table


def lowered(rows: Sequence[Row]) -> str:
    """Sites that were lowered, of those found, and on how many inputs the answer was hard eager's, at the least."""
    routed = [row for row in rows if row.sites]
    if not routed:
        return "no site"
    return f"{routed[0].lowered} of {routed[0].sites} sites, equal on {min(row.equal for row in routed):.1%} of inputs"


def calibrated_table(rows: Sequence[Row]) -> list[str]:
    """The same models before any training of routers."""
    rows = [row for row in rows if row.stage == "calibrated" and row.example not in of_retrieval(rows)]
    columns = [(router, target) for router in ROUTERS for target in (0.5, 0.8)]
    heads = [f"{router} {target:.0%}" for router, target in columns]
    table = ["| example, calibrated alone | " + " | ".join(heads) + " |", "|---" * (1 + len(columns)) + "|"]
    for example, data, metric in dict.fromkeys((row.example, row.data, row.metric) for row in rows):
        mine = [row for row in rows if (row.example, row.data, row.metric) == (example, data, metric)]
        cells = [spread([row for row in mine if (row.side, row.target) == column]) for column in columns]
        table.append(f"| {example}, {data}, {metric} | {' | '.join(cells)} |")
    return table


def novelty_table(rows: Sequence[Row]) -> list[str]:
    """A line for what was told apart, a column for each signal."""
    rows = [row for row in rows if row.metric == NOVELTY]
    signals = list(dict.fromkeys(row.side for row in rows))
    table = [f"| told apart, {NOVELTY} | " + " | ".join(signals) + " |", "|---" * (1 + len(signals)) + "|"]
    for data in dict.fromkeys(row.data for row in rows):
        cells = [[row for row in rows if (row.data, row.side) == (data, signal)] for signal in signals]
        table.append(f"| {data} | {' | '.join(spread(cell, 2) if cell else '' for cell in cells)} |")
    return table


def of_pruning(rows: Iterable[Row]) -> set[str]:
    """Examples that compare ways to prune one model."""
    return {row.example for row in rows if "CAP" in row.side}


def pruning_table(rows: Sequence[Row]) -> list[str]:
    """A line for each metric and way to prune, a column for each sparsity."""
    rows = [row for row in rows if row.example in of_pruning(rows)]
    targets = sorted({row.target for row in rows if row.target})
    heads = [*UNPRUNED, *(f"{target:.0%}" for target in targets)]
    table = ["| pruned | metric | " + " | ".join(heads) + " | seeds |", "|---" * (3 + len(heads)) + "|"]
    for metric in dict.fromkeys(row.metric for row in rows):
        mine = [row for row in rows if row.metric == metric]
        before = [spread([row for row in mine if row.side == side]) for side in UNPRUNED]
        for side in dict.fromkeys(row.side for row in mine if row.target):
            cells = [spread([row for row in mine if (row.side, row.target) == (side, target)]) for target in targets]
            seeds = len({row.seed for row in mine if row.side == side})
            table.append(f"| {side} | {metric} | {' | '.join([*before, *cells])} | {seeds} |")
    return table


def of_retrieval(rows: Iterable[Row]) -> set[str]:
    """Examples whose models read what was found before."""
    return {row.example for row in rows if row.metric.startswith("recall@")}


def found_table(rows: Sequence[Row]) -> list[str]:
    """A line for each retriever."""
    rows = [row for row in rows if row.example in of_retrieval(rows) and row.side not in ("dense", *ROUTERS)]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    table = ["| found in | by | " + " | ".join(metrics) + " |", "|---" * (2 + len(metrics)) + "|"]
    for data, side in dict.fromkeys((row.data, row.side) for row in rows):
        cells = [spread([row for row in rows if (row.side, row.metric) == (side, metric)]) for metric in metrics]
        table.append(f"| {data} | {side} | {' | '.join(cells)} |")
    return table


def read_table(rows: Sequence[Row]) -> list[str]:
    """A line for each metric of the models that read it, a column for each of them."""
    rows = [row for row in rows if row.example in of_retrieval(rows) and row.side in ("dense", *ROUTERS)]
    sides = sorted({(row.side, row.target) for row in rows})
    heads = [f"{side} {target:.0%}" if target else side for side, target in sides]
    table = [f"| read by {rows[0].model} | " + " | ".join(heads) + " |", "|---" * (1 + len(sides)) + "|"]
    by_side = [[row for row in rows if (row.side, row.target) == side] for side in sides]
    for metric in dict.fromkeys(row.metric for row in rows):
        found = [[row for row in mine if row.metric == metric] for mine in by_side]
        cells = [spread(cell) if cell else "" for cell in found]
        table.append(f"| {metric} | {' | '.join(cells)} |")
    shares = [f"{mine[0].sparsity:.1%}" for mine in by_side]
    equal = [f"{min(row.equal for row in mine):.1%}" if mine[0].sites else "" for mine in by_side]
    table.append(f"| measured sparsity of prompts | {' | '.join(shares)} |")
    table.append(f"| logits of the answer as in hard eager | {' | '.join(equal)} |")
    return table


def reasons(rows: Iterable[Row]) -> list[str]:
    noted = dict.fromkeys((row.model, row.note) for row in rows if row.note)
    return [f"- {model}: {note}" for model, note in noted]


def tables(rows: Sequence[Row]) -> str:
    made_on = sorted({row.machine for row in rows})
    versions = sorted({version for row in rows for version in row.versions.split("; ")})
    parts = [task_table(rows), calibrated_table(rows)]
    if any(row.metric == NOVELTY for row in rows):
        parts.append(novelty_table(rows))
    if of_pruning(rows):
        parts.append(pruning_table(rows))
    if of_retrieval(rows):
        parts += [found_table(rows), read_table(rows)]
    refused = reasons(rows)
    if refused:
        parts.append(["Refused:", "", *refused])
    parts.append([f"Made on {'; '.join(made_on)}, with {', '.join(versions)}."])
    return "\n\n".join("\n".join(part) for part in parts)


def with_tables(page: str, rows: Sequence[Row]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}"


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(), read()))


if __name__ == "__main__":
    main()
