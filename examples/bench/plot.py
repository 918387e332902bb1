"""Time against sparsity, one panel a case: our op, the other ways, the dense lines and the byte ideal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.bench.op_cases import CASES, STOCK
from examples.bench.table import describe, latest
from ltepass.measure.records import OpRecord
from ltepass.pages.plots import BLUE, GREY, INK, ORANGE

DENSE_STYLES = dict(zip((*STOCK, "dense upcast"), (":", "--", "-."), strict=True))
PEER_COLOURS = {"index_select": "#059669", "gate-first": ORANGE, "single neurons": "#a855f7"}


def draw(path: Path, records: Sequence[OpRecord]) -> None:
    """Writes an SVG of the newest run of every case. Needs matplotlib (`pip install 'ltepass[plot]'`)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ltepass"  # the same numbers give the same file
    runs = latest(records)
    names = [case.name for case in CASES if case.name in runs]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, runs[name], describe(name))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _panel(axes: object, run: Sequence[OpRecord], title: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.set_title(title, fontsize=9, color=INK)
    axes.set(xlabel="inactive neurons (%)", ylabel="ms")
    for name, style in DENSE_STYLES.items():
        for record in (r for r in run if r.contender == name):
            axes.axhline(record.median_ms, color=GREY, linestyle=style, linewidth=1.2, label=name)
    for name, colour in PEER_COLOURS.items():
        if points := _points(run, name):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, marker=".", label=name)
    ours = sorted((r for r in run if r.contender == "routed"), key=lambda r: r.sparsity)
    x = [100 * r.sparsity for r in ours]
    axes.fill_between(x, [r.p20_ms for r in ours], [r.p80_ms for r in ours], color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(x, [r.median_ms for r in ours], color=BLUE, linewidth=1.8, marker="o", markersize=4, label="ltepass")
    axes.plot(x, [r.byte_ideal_ms for r in ours], color=INK, linestyle=(0, (1, 2)), linewidth=1.0, label="byte ideal")
    dense = [r.median_ms for r in run if r.contender in STOCK]
    axes.set_ylim(0, 1.25 * max(ours[0].median_ms, min(dense, default=0.0)))  # slower baselines leave the panel


def _points(run: Sequence[OpRecord], contender: str) -> list[tuple[float, float]]:
    return sorted((100 * r.sparsity, r.median_ms) for r in run if r.contender == contender)
