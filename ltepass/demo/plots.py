"""Plots as inline SVG text, for pages that need no other file. matplotlib is in the extras `plot` and `demo`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib comes with an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, BLUE, ORANGE, GREY = "#1f2937", "#e5e7eb", "#2563eb", "#ea580c", "#6b7280"
COLOURS = (BLUE, ORANGE, GREY, "#059669")


def sparsity_per_layer(shares: Sequence[float], target: float) -> str:
    """Bars of the measured share of inactive neurons, one per FFN site in order, with the target as a line."""
    figure, axes = _axes("FFN site", "inactive neurons (%)")
    axes.bar(range(len(shares)), [100 * share for share in shares], color=BLUE, width=0.75)
    mean = sum(shares) / len(shares)
    axes.axhline(100 * target, color=ORANGE, linewidth=1.5, label=f"target {target:.0%}")
    axes.axhline(100 * mean, color=INK, linewidth=1.2, linestyle=":", label=f"mean {mean:.1%}")
    axes.set_ylim(0, 100)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(-0.6, len(shares) - 0.4)
    _legend(axes, 2)
    return _svg(figure)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> str:
    """Lines of (x, y) points, one per name."""
    figure, axes = _axes(xlabel, ylabel)
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=1.6, label=name)
    axes.locator_params(axis="x", integer=True)
    _legend(axes, len(series))
    return _svg(figure)


def token_times(milliseconds: Mapping[str, Sequence[float]]) -> str:
    """One box per side: the spread of the time of one token."""
    figure, axes = _axes("ms per token", "", height=0.5 + 0.55 * len(milliseconds))
    names = list(milliseconds)[::-1]
    boxes = axes.boxplot(
        [list(milliseconds[name]) for name in names], orientation="horizontal", widths=0.55, patch_artist=True, sym="."
    )
    for box in boxes["boxes"]:
        box.set(facecolor="#dbeafe", edgecolor=BLUE)
    for line in boxes["medians"]:
        line.set(color=ORANGE, linewidth=2)
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set_xlim(left=0)
    return _svg(figure)


def bars(values: Mapping[str, tuple[float, float]], xlabel: str, least: str) -> str:
    """One bar a name, with a mark at the second value, which the first cannot fall below. least: what the mark is."""
    figure, axes = _axes(xlabel, "", height=0.7 + 0.28 * len(values))
    names = list(values)[::-1]
    axes.barh(names, [values[name][0] for name in names], color=BLUE, height=0.7)
    axes.plot(
        [values[name][1] for name in names], names, "|", color=ORANGE, markersize=12, markeredgewidth=2, label=least
    )
    _legend(axes, 1)
    return _svg(figure)


def _axes(xlabel: str, ylabel: str, height: float = 2.6) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "ltepass"  # the same numbers give the same file
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=GREY, labelcolor=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    return figure, axes


def _legend(axes: Axes, columns: int) -> None:
    """Above the axes, where it hides no data."""
    axes.legend(frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]  # the XML header has no place inside a page
