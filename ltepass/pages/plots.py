"""Plots as inline SVG text, for pages that need no other file. matplotlib is in the extras `plot` and `demo`."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib comes with an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, BLUE, ORANGE, GREY = "#1f2937", "#e5e7eb", "#2563eb", "#ea580c", "#6b7280"
GREEN, PALE = "#059669", "#dbeafe"
COLOURS = {"ink": INK, "line": GRID, "blue": BLUE, "orange": ORANGE, "grey": GREY, "green": GREEN, "pale": PALE}
SERIES = (BLUE, ORANGE, GREEN, GREY)
WIDTH, SMALL = 4.8, 2.6  # inches: labels are readable where a phone shows it as wide as it is


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def sparsity_per_layer(shares: Sequence[float], target: float | None) -> str:
    """Bars of the share of inactive neurons, one per FFN site in order, with the target as a line."""
    figure, axes = _axes("FFN site", "inactive neurons (%)")
    axes.bar(range(len(shares)), [100 * share for share in shares], color=BLUE, width=0.75)
    mean = sum(shares) / len(shares)
    if target is not None:
        axes.axhline(100 * target, color=ORANGE, linewidth=1.5, label=f"target {target:.0%}")
    axes.axhline(100 * mean, color=INK, linewidth=1.2, linestyle=":", label=f"mean {mean:.1%}")
    axes.set_ylim(0, 100)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(-0.6, len(shares) - 0.4)
    _legend(axes, 2)
    return _svg(figure)


def score_histogram(quantiles: Sequence[float], threshold: float | None) -> str:
    """A small one of a router's logits, whose experts are inactive left of the line. quantiles: [101], 0 % to 100 %.

    The outermost percents are left out: a single logit far away would leave no room for the others.
    """
    import numpy as np

    figure, axes = _axes("router's logit", "", height=1.5, width=SMALL)
    low, high = quantiles[1], quantiles[-2]
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    edges = np.linspace(low, high, 41)
    shares = np.diff(np.interp(edges, quantiles, np.linspace(0, 1, len(quantiles))))
    middles = (edges[:-1] + edges[1:]) / 2
    colours = [BLUE if threshold is None or middle > threshold else GREY for middle in middles]
    axes.bar(middles, shares, width=edges[1] - edges[0], color=colours)
    if threshold is not None:
        axes.axvline(threshold, color=ORANGE, linewidth=1.5)
    axes.set_yticks([])
    return _svg(figure)


def spread_by_site(spreads: Sequence[tuple[float, float, float]], ylabel: str) -> str:
    """A line a site from the least to the most of some shares, with their median. spreads: (least, median, most)."""
    figure, axes = _axes("FFN site", ylabel)
    least, median, most = ([100 * share for share in column] for column in zip(*spreads, strict=True))
    axes.vlines(range(len(spreads)), least, most, color=BLUE, linewidth=4, label="least to most used")
    axes.plot(range(len(spreads)), median, "_", color=ORANGE, markersize=9, markeredgewidth=2.5, label="median")
    axes.set_ylim(-2, 102)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlim(-0.6, len(spreads) - 0.4)
    _legend(axes, 2)
    return _svg(figure)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, *, points: bool = False
) -> str:
    """Lines of (x, y) points, one per name. points: each is marked, and x may lie between whole numbers."""
    figure, axes = _axes(xlabel, ylabel)
    for (name, line), colour in zip(series.items(), SERIES, strict=False):
        marker = "o" if points else None
        xs, ys = zip(*line, strict=True)
        axes.plot(xs, ys, marker=marker, color=colour, linewidth=1.6, label=plain(name))
    if not points:
        axes.locator_params(axis="x", integer=True)
    _legend(axes, min(len(series), 3))
    return _svg(figure)


def token_times(milliseconds: Mapping[str, Sequence[float]]) -> str:
    """One box per side: the spread of the time of one token."""
    figure, axes = _axes("ms per token", "", height=0.5 + 0.55 * len(milliseconds))
    names = list(milliseconds)[::-1]
    boxes = axes.boxplot(
        [list(milliseconds[name]) for name in names], orientation="horizontal", widths=0.55, patch_artist=True, sym="."
    )
    for box in boxes["boxes"]:
        box.set(facecolor=PALE, edgecolor=BLUE)
    for line in boxes["medians"]:
        line.set(color=ORANGE, linewidth=2)
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.set_xlim(left=0)
    return _svg(figure)


def bars(values: Mapping[str, tuple[float, float]], xlabel: str, least: str) -> str:
    """One bar a name, with a mark at the second value, which the first cannot fall below. least: what the mark is."""
    figure, axes = _axes(xlabel, "", height=0.8 + 0.32 * len(values))
    names = list(values)[::-1]
    rows = range(len(names))
    axes.barh(rows, [values[name][0] for name in names], color=BLUE, height=0.7)
    axes.plot(
        [values[name][1] for name in names], rows, "|", color=ORANGE, markersize=12, markeredgewidth=2, label=least
    )
    axes.set_yticks(rows, [plain(name) for name in names])
    _legend(axes, 1)
    return _svg(figure)


def plain(text: str) -> str:
    """Without the dollars that begin a formula: a name is none."""
    return text.replace("$", r"\$")


def _axes(xlabel: str, ylabel: str, height: float = 2.6, width: float = WIDTH) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "ltepass"  # the same numbers give the same file
    figure = Figure(figsize=(width, height), layout="constrained")
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
    axes.legend(
        frameon=False, labelcolor=INK, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2
    )


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :]  # the XML header has no place inside a page
