"""The frontier's page and plot, made from its rows alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.compare.domains_view import domains_view
from examples.compare.frontier_rows import (
    FAR,
    NOT_DEPLOYABLE,
    WITH_CUTS,
    Row,
    at_bytes,
    ratios,
    shown_at,
    spread_of,
    time_at,
)

OLDER = "\u2020"
# How each method skips, as ffn_time.py measures it.
WAYS = {
    "lte": "routed", "lte-calibrated": "routed", "lte-warm": "routed", "lte-one-checkpoint": "routed",
    "topk": "routed", "prunepath": "routed", "noisy-topk": "routed", "random": "routed",
    "moefication": "predicted experts",
    "lte-proxy": "proxy", "lte-proxy-warm": "proxy", "lte-proxy-trained": "proxy",
    "dejavu": "predicted neurons", "cats": "gate-first", "teal": "single neurons", "teal-trained": "single neurons",
    "lte+teal": "routed, small units cut", "lte+cuts": "routed, small inputs and units cut",
    "lte+cuts-one-checkpoint": "routed, small inputs and units cut",
}  # fmt: skip


def _groups(rows: Sequence[Row]) -> str:
    """Neurons an expert: what most rows have, then the methods that differ."""
    usual, _ = Counter(r["group_size"] for r in rows).most_common(1)[0]
    others = sorted({(r["method"], r["group_size"]) for r in rows if r["group_size"] != usual})
    return ", ".join([f"Groups of {usual}", *(f"of {size} in {method}" for method, size in others)])


def write_table(rows: Sequence[Row], path: Path, times: Sequence[Row] = ()) -> None:
    """times: rows of ffn_time.py, for the model whose FFN they measure; a third view is made where there are any."""
    lines = [
        "# The frontier",
        "",
        "Made by `examples/compare/frontier.py` from the CSV beside it; nothing here is typed.",
    ]
    lines += _cut_samples(rows)
    by = ratios(rows)
    older = {(r["preset"], r["method"], r["target_sparsity"]) for r in rows if _has_older_cuts(r)}
    for preset, text in sorted({(p, t) for p, t, _ in by}):
        here = [r for r in rows if (r["preset"], r["text"]) == (preset, text)]
        cells = Counter((r["method"], r["target_sparsity"]) for r in here)
        least, most = min(cells.values()), max(cells.values())
        seeds = f"{most} seed(s)" if least == most else f"{least} to {most} seeds (ranges in the first table)"
        dense = [float(r["perplexity"]) for r in here if r["method"] == "dense"]
        facts = here[-1]
        untuned = [float(r["perplexity"]) for r in here if r["method"] == "dense-untuned"]
        lines += [
            "",
            f"## {facts['model']}, {text}, preset {preset}",
            "",
            f"Dense: {spread_of(untuned) if untuned else '-'} before, {spread_of(dense)} after "
            f"{max(int(r['trained_tokens']) for r in here):,} tokens. {_groups(here)}; "
            f"{seeds}; torch {facts['torch']}; {facts['machine']}.",
            "",
            *_equal_sparsity(by, preset, text, older),
            "",
            *_equal_bytes(by, preset, text),
            *(_equal_time(by, preset, text, times) if facts["model"] == "smollm2" and times else ()),
        ]
    for preset in sorted({r["preset"] for r in rows}):
        lines += domains_view(rows, preset)
    for preset in sorted({"cpu", "gpu"} - {r["preset"] for r in rows}):
        command = (
            f"python -m examples.compare.frontier --preset {preset} --texts FOLDER --results {path.with_suffix('')}"
        )
        lines += ["", f"## Preset {preset}: not measured", "", f"`{command}`"]
    path.write_text("\n".join(lines) + "\n")


def _methods(by: Any, preset: str, text: str) -> list[str]:
    found = [m for p, t, m in by if (p, t) == (preset, text) and m != "dense-untuned"]
    return sorted(found, key=lambda m: (m != "lte", m in NOT_DEPLOYABLE, m))


def _has_older_cuts(row: Row) -> bool:
    return row["method"] in WITH_CUTS and not row.get("cut_sample")


def _cut_samples(rows: Sequence[Row]) -> list[str]:
    """What the mark says, and which rows were measured again."""
    if not any(map(_has_older_cuts, rows)):
        return []
    again = sorted(
        {f"{r['method']} at {float(r['target_sparsity']):.0%} ({r['preset']})" for r in rows if r.get("cut_sample")}
    )
    return [
        "",
        f"{OLDER} Measured with cuts that were placed by every k-th entry of a batch, which sees few of an FFN's "
        "inputs where k divides their number; cuts are placed by random rows now. Sparsity, bytes and perplexity are "
        "what was measured under those cuts. What stands on such a row in the other views has the same origin.",
        f"Measured again by random rows: {', '.join(again) or 'none yet'}.",
    ]


def _equal_sparsity(by: Any, preset: str, text: str, older: set[tuple[str, str, str]]) -> list[str]:
    targets = sorted(
        {s for (p, t, m), c in by.items() if (p, t) == (preset, text) for s in c if float(s) > 0}, key=float
    )
    lines = ["Equal FFN sparsity (perplexity over the tuned dense model's; measured sparsity in brackets):", ""]
    lines += ["| method | " + " | ".join(f"{float(s):.0%}" for s in targets) + " |", "|---|" + "---|" * len(targets)]
    for method in _methods(by, preset, text):
        curve = by[preset, text, method]
        values = [
            f"x{spread_of([r for r, _, _ in curve[s]])} [{statistics.fmean(x for _, x, _ in curve[s]):.1%}]"
            + (OLDER if (preset, method, s) in older else "")
            if s in curve
            else "not measured"
            for s in targets
        ]
        lines.append(f"| {_label(method)} | " + " | ".join(values) + " |")
    return lines


def _equal_bytes(by: Any, preset: str, text: str) -> list[str]:
    """At the bytes that LTE reads at each of its points, every method interpolated between its own points."""
    lte = by.get((preset, text, "lte"), {})
    shares = [
        (s, statistics.fmean(b for _, _, b in points)) for s, points in sorted(lte.items(), key=lambda kv: float(kv[0]))
    ]
    if not shares:
        return []
    lines = [
        "Equal bytes of FFN weights read per token (interpolated between measured points and dense; - is outside "
        f"them; ~ between points over {FAR:.0%} of the bytes apart, which overstates what a method loses):",
        "",
    ]
    lines += ["| method | " + " | ".join(f"{b:.1%}" for _, b in shares) + " |", "|---|" + "---|" * len(shares)]
    for method in _methods(by, preset, text):
        curve = [
            (statistics.fmean(b for _, _, b in p), math.exp(statistics.fmean(math.log(r) for r, _, _ in p)))
            for p in by[preset, text, method].values()
        ]
        curve.append((1.0, 1.0))  # with every neuron active each method is the dense model
        lines.append(f"| {_label(method)} | " + " | ".join(shown_at(curve, b) for _, b in shares) + " |")
    return lines


def _equal_time(by: Any, preset: str, text: str, times: Sequence[Row]) -> list[str]:
    """At the time that LTE's FFN takes at each of its points, every method interpolated between its own points."""
    stock = min((r for r in times if r["way"].startswith("dense")), key=lambda r: float(r["median_ms"]))
    dense = float(stock["median_ms"])
    curves: dict[str, list[tuple[float, float]]] = {}
    for method in _methods(by, preset, text):
        points = by[preset, text, method].values()
        means = [(statistics.fmean(s for _, s, _ in p), statistics.fmean(math.log(r) for r, _, _ in p)) for p in points]
        timed = [(time_at(times, WAYS.get(method, ""), s), math.exp(r)) for s, r in means]
        curves[method] = [(t, r) for t, r in timed if t is not None] + [(dense, 1.0)]
    wanted = sorted((t for t, _ in curves.get("lte", [])[:-1]), reverse=True)
    if not wanted:
        return []
    shape = f"{stock['d_model']} x {stock['d_ff']}, {stock['dtype']}, {stock['threads']} threads, {stock['machine']}"
    lines = [
        "",
        f"Equal measured time of the FFN at one token ({shape}; `ffn_time.py` says what runs for each method; dense at "
        f"its best {dense:.3f} ms; - is outside the measured points):",
        "",
        "| method | " + " | ".join(f"{t:.3f} ms ({dense / t:.2f}x)" for t in wanted) + " |",
        "|---|" + "---|" * len(wanted),
    ]
    for method, curve in curves.items():
        values = [at_bytes(curve, t) for t in wanted]
        shown = " | ".join("-" if v is None else f"x{spread_of([v])}" for v in values)
        lines.append(f"| {_label(method)} | {shown} |")
    return lines


def _label(method: str) -> str:
    return f"{method} (not deployable)" if method in NOT_DEPLOYABLE else method


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """One panel per preset and text: perplexity over dense against bytes read, both views' points on one line."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "ltepass"  # the same rows give the same file
    by = ratios(rows)
    panels = sorted({(p, t) for p, t, _ in by})
    if not panels:
        return
    figure = Figure(figsize=(4.6 * len(panels), 4.0), layout="constrained")
    for axes, (preset, text) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, method in enumerate(_methods(by, preset, text)):
            curve = sorted(
                (statistics.fmean(b for _, _, b in p), statistics.fmean(r for r, _, _ in p))
                for p in by[preset, text, method].values()
            )
            style = {"linewidth": 2.4, "color": "#ea580c"} if method == "lte" else {"linewidth": 1.2, "color": f"C{i}"}
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=_label(method), **style)
        axes.set_yscale("log")
        axes.set_title(f"{text} ({preset})", fontsize=9)
        axes.set_xlabel("share of FFN weight bytes read per token")
        axes.set_ylabel("perplexity / tuned dense")
        axes.grid(True, which="both", color="#e5e7eb")
        axes.legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})
