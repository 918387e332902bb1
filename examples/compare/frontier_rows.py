"""The frontier's rows: one per method, sparsity, seed and text; the table and the plot are made from them alone."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from examples.compare.measured import Measured
from ltepass.measure.quality import FEWEST_BLOCKS, ratio_of_perplexities
from ltepass.whole_file import whole_file

FIELDS = (
    "preset model method deployable trained_tokens group_size target_sparsity seed text ffn_sparsity bytes_share "
    "perplexity seconds machine torch transformers cut_sample domain ratio ratio_low ratio_high measured_tokens".split()
)
Row = dict[str, str]
NOT_DEPLOYABLE = ("oracle",)
WITH_CUTS = ("lte+teal", "lte+cuts", "lte+cuts-one-checkpoint")
OUTSIDE = "outside"  # the training domain; older rows do not say, and stand inside it
CUT_SAMPLE = "rows"  # what a cut is placed by now; rows that do not say so are older, and theirs was every k-th entry


class Rows:
    """A CSV that grows by whole cells."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        if not self.path.exists():
            return []
        with self.path.open() as file:
            return list(csv.DictReader(file))

    def has(self, cell: Any, preset: str) -> bool:
        return any(
            (r["preset"], r["method"], float(r["target_sparsity"]), int(r["seed"]))
            == (preset, cell.method, cell.sparsity, cell.seed)
            for r in self.read()
        )

    def add(
        self,
        cell: Any,
        preset: str,
        budget: Any,
        measured: Measured,
        *,
        dense: Mapping[str, Tensor],
        outside: Container[str],
        trained: bool,
        seconds: float,
        where: str,
    ) -> None:
        """A row a text. Perplexity is of the budget's test blocks, the rest of all that were measured; dense: losses of
        the better dense model on each text; outside: texts outside the training domain."""
        known = self.read()
        for text, found in measured.items():
            known.append(
                {
                    "preset": preset,
                    "model": budget.model,
                    "method": cell.method,
                    "deployable": str(cell.method not in NOT_DEPLOYABLE),
                    "trained_tokens": str(budget.tokens if trained else 0),
                    "group_size": str(budget.group_size),
                    "target_sparsity": f"{cell.sparsity:g}",
                    "seed": str(cell.seed),
                    "text": text,
                    "ffn_sparsity": f"{found.sparsity:.4f}",
                    "bytes_share": f"{found.bytes_share:.4f}",
                    "perplexity": f"{found.perplexity(budget.test):.4f}",
                    "seconds": f"{seconds:.0f}",
                    "machine": where,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "cut_sample": CUT_SAMPLE if cell.method in WITH_CUTS else "",
                    "domain": OUTSIDE if text in outside else "training",
                    **_over(found.losses, dense[text]),
                    "measured_tokens": str(found.losses.shape[0] * (found.losses.shape[1] + 1)),
                }
            )
        write_rows(self.path, FIELDS, known)


def _over(losses: Tensor, dense: Tensor) -> Row:
    """The ratio with its interval, where there are blocks enough for one."""
    if len(losses) < FEWEST_BLOCKS:
        return {}
    ratio = ratio_of_perplexities(losses, dense)
    return {"ratio": f"{ratio.value:.4f}", "ratio_low": f"{ratio.low:.4f}", "ratio_high": f"{ratio.high:.4f}"}


def write_rows(path: Path, fields: Sequence[str], rows: Sequence[Row]) -> None:
    """The whole CSV at once: a run that is stopped leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, list[tuple[float, float, float]]]]:
    """(preset, text, method) -> target -> [(perplexity / tuned dense, FFN sparsity, bytes share)] by seed, inside
    the training domain."""
    rows = [r for r in rows if r.get("domain") != OUTSIDE]
    dense = {(r["preset"], r["text"], r["seed"]): float(r["perplexity"]) for r in rows if r["method"] == "dense"}
    out: dict[Any, Any] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        base = dense.get((r["preset"], r["text"], r["seed"]))
        if base is not None and r["method"] != "dense":
            point = float(r["perplexity"]) / base, float(r["ffn_sparsity"]), float(r["bytes_share"])
            out[r["preset"], r["text"], r["method"]][r["target_sparsity"]].append(point)
    return out


Point = tuple[float, float]  # share of bytes, ratio
FAR = 0.15  # of the bytes, between two points


def around(curve: Sequence[Point], share: float) -> tuple[Point, Point] | None:
    """The two neighbouring points of a curve that hold a share of bytes between them."""
    return next(((a, b) for a, b in pairwise(sorted(curve)) if a[0] <= share <= b[0]), None)


def at_bytes(curve: Sequence[Point], share: float) -> float | None:
    """The ratio at a share of bytes, log-linear between measured points; None outside them."""
    found = around(curve, share)
    if found is None:
        return None
    (b0, r0), (b1, r1) = found
    t = (share - b0) / (b1 - b0) if b1 > b0 else 0.0
    return math.exp((1 - t) * math.log(r0) + t * math.log(r1))


def shown_at(curve: Sequence[Point], share: float) -> str:
    """As the table has it, with a mark where the points lie far apart."""
    value, found = at_bytes(curve, share), around(curve, share)
    if value is None or found is None:
        return "-"
    far = found[1][0] - found[0][0] > FAR and all(abs(share - b) > 1e-9 for b, _ in found)
    return f"{'~' if far else ''}x{spread_of([value])}"


def time_at(times: Sequence[Row], way: str, sparsity: float) -> float | None:
    """Milliseconds of an FFN computed in this way at a sparsity, linear between measured ones; None outside them."""
    points = sorted((float(r["sparsity"]), float(r["median_ms"])) for r in times if r["way"] == way)
    for (s0, t0), (s1, t1) in pairwise(points):
        if s0 <= sparsity <= s1:
            return t0 + (t1 - t0) * (sparsity - s0) / (s1 - s0)
    return None


def spread_of(values: Sequence[float]) -> str:
    """Mean, and the seeds' range where there are several."""
    mean = statistics.fmean(values)
    shown = f"{mean:.3f}" if mean < 10 else f"{mean:.3g}"
    return shown if len(values) < 2 else f"{shown} ({min(values):.3f} .. {max(values):.3f})"
