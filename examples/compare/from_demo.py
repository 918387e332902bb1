"""The frontier without training: the two checkpoints of `ltepass demo`, and every post-hoc method on its dense one.

    ltepass demo                                                     (make demo)
    python -m examples.compare.from_demo --demo lte-demo --results examples/results/frontier

Both checkpoints saw the same tokens; the text is the held-out one. Other sparsities of LTE are the one checkpoint's
table (`set_sparsity`), under the name lte-one-checkpoint: none was trained for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import ltepass
from examples.compare import models
from examples.compare.frontier import Frontier, finish
from examples.compare.frontier_rows import Rows
from examples.compare.interval_workshop import DENSE
from examples.compare.measured import measure_lte
from examples.compare.presets import POST_HOC, Cell, Preset
from examples.compare.study import DEVICE, Budget, Data
from ltepass.demo.task import load_task
from ltepass.demo.training_loop import batches

PRESET = "demo"
POINTS = (0.5, 0.4, 0.7, 0.8, 0.9)  # 0.4: with it, TEAL is measured on both sides of the bytes that LTE reads at 0.5
ONE_CHECKPOINT = "lte-one-checkpoint"


class FromDemo(Frontier):
    """A frontier whose trained models are there already."""

    def __init__(self, demo: Path, work: Path, rows: Rows, blocks: int) -> None:
        kept = json.loads((demo / "results.json").read_text())
        options, stages = kept["options"], kept["stages"]
        self.demo, self.name, self.rows, self.work = demo, PRESET, rows, work
        self.target = float(options["target_sparsity"])
        self.task = load_task(options["model"])
        self.budget = Budget(
            model=options["model"], steps=stages["prepare"]["steps"], batch=self.task.batch,
            length=self.task.train.shape[1], learning_rate=0.0, test=blocks, test_length=self.task.test.shape[1],
            calibration=24, group_size=self.task.group_size,
        )  # fmt: skip
        assert self.budget.tokens == stages["tune_dense"]["tokens"], "the demo trained on other tokens than it says"
        train = torch.cat(list(batches(self.task.train, self.task.batch, self.budget.steps, options["seed"])))
        self.preset = Preset(budget=self.budget, points=POINTS, trained_points=())
        test = {"python reference": self.task.test}
        measured = {**test, **self.task.others}
        self._data = {
            0: Data(train, train[:0], {n: b[:blocks] for n, b in test.items()}, self.task.tokenizer, measured)
        }
        self._prepared = self._samples = None
        self._dense = {}

    def base(self) -> Any:
        return models.load(self.budget.model, self.work).to(DEVICE)

    def tuned(self, seed: int) -> Any:
        return models.load(str(self.demo / "dense"), self.work).to(DEVICE)

    def run(self, cell: Cell) -> None:
        if cell.method in DENSE:
            self.add(cell, *self.dense(cell.method, 0))
            return
        data, start = self.data(0), time.perf_counter()
        if cell.method in ("lte", ONE_CHECKPOINT):
            model = models.load(str(self.demo / "lte"), self.work).to(DEVICE)
            if cell.method == ONE_CHECKPOINT:
                ltepass.set_sparsity(model, cell.sparsity)
            measured = measure_lte(model, data.measured)
        else:
            measured = self._post_hoc(cell, data)
        self.add(cell, measured, time.perf_counter() - start)


def cells(target: float) -> Iterator[Cell]:
    yield from (Cell("dense-untuned", 0.0, 0), Cell("dense", 0.0, 0), Cell("lte", target, 0))
    for point in POINTS:
        for method in (ONE_CHECKPOINT, *POST_HOC):
            if (method, point) != (ONE_CHECKPOINT, target):
                yield Cell(method, point, 0)


def main(
    demo: Annotated[Path, typer.Option(help="What `ltepass demo` wrote.")] = Path("lte-demo"),
    results: Annotated[Path, typer.Option(help="RESULTS.csv, .md and .svg are written.")] = Path("frontier"),
    work: Annotated[Path, typer.Option(help="Where calibrated models are kept.")] = Path("frontier-work"),
    blocks: Annotated[int, typer.Option(help="Held-out blocks to measure on.")] = 4,
    only: Annotated[str, typer.Option(help="Methods, comma-separated; all if empty.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin no cell after so many minutes.")] = 1e9,
) -> None:
    rows = Rows(results.with_suffix(".csv"))
    study, start = FromDemo(demo, work, rows, blocks), time.perf_counter()
    for cell in cells(study.target):
        left_out = bool(only) and cell.method not in only.split(",")
        if left_out or rows.has(cell, PRESET) or time.perf_counter() - start > 60 * minutes:
            continue
        study.run(cell)
        print(f"{cell.method} {cell.sparsity:g}: {time.perf_counter() - start:.0f} s", flush=True)
    finish(rows, results)


if __name__ == "__main__":
    typer.run(main)
