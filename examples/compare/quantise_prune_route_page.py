"""The rows of `quantise_prune_route.py`, their table, and what beats what."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ltepass.measure.quality import Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["quantised", "llama.cpp", "pruned", "routed", "tiers"]
PLAIN: tuple[Kind, ...] = ("quantised", "llama.cpp")
THREADS = 1, 2
TEXTS = ("Python reference", "graph theory", "C++")
PARTS = "value", "low", "high"
COLOURS = dict(zip(get_args(Kind), ("#6b7280", "#1f2937", "#a855f7", "#2563eb", "#ea580c"), strict=True))
MARKERS = dict(zip(get_args(Kind), "osdv^", strict=True))
HIGHEST = 1.6  # ratio on the plot
APART, WIDE = 0.02, 1.8  # of names there: their height, and how wide they are on a logarithmic axis


@dataclass(kw_only=True)
class Row:
    """Of a point. ratios: by text; ms: by number of threads, the median, and what a fifth of the tokens stays below and
    above. Megabytes are 10^6 bytes: read by a token, and of the process above its imports.
    """

    kind: Kind
    method: str
    ratios: dict[str, Ratio]
    ms: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    read_mb: float = math.nan
    resident_mb: float = math.nan
    tokens: int = 0
    machine: str = ""
    torch: str = ""
    ltepass: str = ""

    @property
    def ratio(self) -> float:
        """Of perplexities, the mean of the texts."""
        return math.exp(statistics.fmean(math.log(r.value) for r in self.ratios.values()))


def write(path: Path, rows: Sequence[Row]) -> None:
    """The CSV, and the page beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = [_flat(row) for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    path.with_suffix(".md").write_text(page(rows))


def _flat(row: Row) -> dict[str, str]:
    ratios = {f"{t} {part}": f"{getattr(row.ratios[t], part):.4f}" for t in TEXTS for part in PARTS}
    nothing = (math.nan,) * 3
    times = {
        f"{part} {n}": f"{value:.4g}"
        for n in THREADS
        for part, value in zip(("ms", "p20", "p80"), row.ms.get(n, nothing), strict=True)
    }
    megabytes = {name: f"{getattr(row, name):.4g}" for name in ("read_mb", "resident_mb")}
    words = {name: str(getattr(row, name)) for name in ("tokens", "machine", "torch", "ltepass")}
    return {"kind": row.kind, "method": row.method} | ratios | times | megabytes | words


def read(path: Path) -> list[Row]:
    """None where there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return [_row(flat) for flat in csv.DictReader(file)]


def _row(flat: Mapping[str, str]) -> Row:
    def times(n: int) -> tuple[float, float, float]:
        return float(flat[f"ms {n}"]), float(flat[f"p20 {n}"]), float(flat[f"p80 {n}"])

    return Row(
        kind=flat["kind"],  # type: ignore[arg-type]  # one of them
        method=flat["method"],
        ratios={t: Ratio(**{part: float(flat[f"{t} {part}"]) for part in PARTS}) for t in TEXTS},
        ms={n: times(n) for n in THREADS if flat[f"ms {n}"] != "nan"},
        read_mb=float(flat["read_mb"]),
        resident_mb=float(flat["resident_mb"]),
        tokens=int(flat["tokens"]),
        machine=flat["machine"],
        torch=flat["torch"],
        ltepass=flat["ltepass"],
    )


def beaten_by(row: Row, rows: Sequence[Row], threads: int | None) -> Row | None:
    """The cheapest of the plainly quantised rows, of another kind, that are no worse in quality and cost no more.
    threads: of the time of a token; None: the cost is memory.
    """

    def cost(r: Row) -> float:
        return r.resident_mb if threads is None else r.ms[threads][0]

    better = [
        r for r in rows if r.kind in PLAIN and r.kind != row.kind and r.ratio <= row.ratio and cost(r) <= cost(row)
    ]
    return min(better, key=cost, default=None)


def page(rows: Sequence[Row]) -> str:
    tokens = min(row.tokens for row in rows)
    lines = [
        "# Should I quantise, prune or route?",
        "",
        "Made by `examples/compare/quantise_prune_route.py` from the CSV beside it; nothing here is typed. The "
        "model is SmolLM2-135M off the grid of its 4-bit file; its perplexity is over dense fp32, with the 95 % "
        f"interval of paired differences per block, {tokens:,} tokens a text. Codes, tables and what is pruned come "
        "from other text of the first column's domain; the other columns are outside it. All but llama.cpp's rows "
        "are folders of `ltepass export`, attention and head in the format that the row names. llama.cpp runs the "
        "same weights (its head is Q8_0 where the rest has 4 bits). Beaten by: the fastest, or smallest, of the "
        "rows `quantised` and `llama.cpp` that is no worse in the mean of the three texts and costs no more.",
        "",
    ]
    timed = [row for row in rows if len(row.ms) == len(THREADS)]
    if not timed:
        return "\n".join([*lines, "No times yet.", ""])
    first = timed[0]
    lines += [
        f"{first.machine}, torch {first.torch}; a token after 64, its median in all turns (p20 .. p80).",
        "",
        "![quality against time and memory](quantise_prune_route.svg)",
        "",
    ]
    lines += [*_verdict(timed), ""]
    head = "".join(f" {text} |" for text in TEXTS) + "".join(f" ms, {n} thread{'s' * (n > 1)} |" for n in THREADS)
    lines += [f"| | method |{head} MB read | MB resident |", "|---|---|" + "---|" * (len(TEXTS) + len(THREADS) + 2)]
    for row in timed:
        cells = [str(row.ratios[text]) for text in TEXTS]
        cells += [f"{m:.2f} ({low:.2f} .. {high:.2f})" for m, low, high in (row.ms[n] for n in THREADS)]
        cells += [f"{row.read_mb:.0f}", f"{row.resident_mb:.0f}"]
        lines.append(f"| {row.kind} | {row.method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _verdict(rows: Sequence[Row]) -> list[str]:
    """A table: what beats each point that is not plainly ours, in time on each number of threads and in memory."""
    views: tuple[int | None, ...] = (*THREADS, None)
    head = " | ".join(f"in time, {n} thread{'s' * (n > 1)}" for n in THREADS)
    lines = [f"| | method | mean of the texts | beaten {head} | in memory |", "|---|---|---|" + "---|" * len(views)]
    for row in (r for r in rows if r.kind != "quantised"):
        found = [beaten_by(row, rows, view) for view in views]
        cells = " | ".join("no" if other is None else f"by {other.method}" for other in found)
        lines.append(f"| {row.kind} | {row.method} | x{row.ratio:.3f} | {cells} |")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Two panels: quality against the time of a token on one thread, and against memory."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "ltepass"  # the same rows give the same file
    figure = Figure(figsize=(11.0, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, [(row, row.ms[1][0]) for row in rows if row.ms], "ms a token, 1 thread")
    _panel(right, [(row, row.resident_mb) for row in rows if row.ms], "MB resident")
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _panel(axes: Axes, costs: Sequence[tuple[Row, float]], label: str) -> None:
    """Points, and the line of what plain quantisation gives at most."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    line: list[tuple[float, float]] = []
    for row, cost in sorted((pair for pair in costs if pair[0].kind in PLAIN), key=lambda pair: pair[1]):
        if not line or row.ratio < line[-1][1]:
            line.append((cost, row.ratio))
    axes.step(*zip(*line, strict=True), where="post", color="#6b7280", linewidth=1.0)
    names: list[tuple[float, float]] = []
    for row, cost in sorted(costs, key=lambda pair: pair[0].ratio):
        at = cost, min(row.ratio, HIGHEST)
        axes.plot(*at, MARKERS[row.kind], color=COLOURS[row.kind], label=row.kind)
        y = at[1]
        while any(abs(y - other) < APART and 1 / WIDE < cost / x < WIDE for x, other in names):
            y += APART
        names.append((cost, y))
        leader = {"arrowstyle": "-", "color": "#9ca3af", "linewidth": 0.5}
        axes.annotate(row.method, at, (1.03 * cost, y), fontsize=6.0, va="center", arrowprops=leader)
    axes.set_xscale("log")
    axes.set_xlim(right=1.5 * max(cost for _, cost in costs))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.98, HIGHEST + 0.06)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity over dense, mean of three texts")
    axes.grid(True, which="both", color="#e5e7eb")
