"""The frontier: one command trains and measures every method at several FFN sparsities on the same text and tokens.

    python -m examples.compare.frontier --preset smoke                   a minute: a tiny model
    python -m examples.compare.frontier --preset small --texts FOLDER    SmolLM2-135M, few tokens, half an hour
    python -m examples.compare.frontier --preset cpu --texts FOLDER      SmolLM2-135M, two hours and a half on 2 cores
    python -m examples.compare.frontier --preset long --texts FOLDER --only dense,lte+cuts,teal   three times the tokens
    python -m examples.compare.frontier --preset gpu --texts FOLDER      SmolLM2-135M, three seeds, on a GPU

Rows go to RESULTS.csv as they are measured; what stands there already is not run again, so a run that was stopped goes
on. The table (RESULTS.md) and the plot (RESULTS.svg) are made from the rows at the end.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import ltepass
from examples.compare import models
from examples.compare.cuts import CUTS, Cuts, expert_sparsity, measure_cut, n_matrices
from examples.compare.frontier_page import write_plot, write_table
from examples.compare.frontier_rows import Rows
from examples.compare.interval_workshop import DENSE, UNTUNED, IntervalWorkshop
from examples.compare.measured import Measured, measure_lte, measure_rule
from examples.compare.methods import RULES
from examples.compare.presets import (
    CALIBRATED_ONLY,
    FROM_ONE,
    ONE_CHECKPOINT,
    OURS,
    POST_HOC,
    PRESETS,
    PROXIES,
    STARTS,
    Cell,
    cells,
)
from examples.compare.rule_hooks import Ruled, Samples, collect
from examples.compare.study import (
    DEVICE,
    Data,
    Recipe,
    calibration_blocks,
    group_size,
    retarget,
    transform,
)
from examples.compare.tuning import tune_dense, tune_lte
from ltepass.calibration.refit_down import warm_start
from ltepass.config import RouterKind
from ltepass.measure.machine import machine as cpu_line
from ltepass.training.stages import settle

SAMPLE_TOKENS = 16_384  # of training text, kept for the rules


class Frontier(IntervalWorkshop):
    """Every method on what the workshop has, row by row."""

    def __init__(
        self, preset: str, texts: Path | None, work: Path, rows: Rows, others: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(PRESETS[preset].blocks, others, preset, PRESETS[preset].budget, texts, work)
        self.preset, self.rows = PRESETS[preset], rows
        self._prepared: tuple[tuple[str, int, RouterKind], Any] | None = None
        self._samples: Samples | None = None

    def recipe(self, method: str) -> Recipe:
        return replace(self.preset.recipe, router="proxy") if method in PROXIES else self.preset.recipe

    def prepared(self, start: str, seed: int, method: str = "lte") -> Any:
        """A calibrated model, from the dense one as it came ("base") or tuned.

        Kept on the disk, and the last one loaded: everything that does not depend on the sparsity is done once.
        """
        recipe = self.recipe(method)
        key = start, seed, recipe.router
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = self._samples = None
            kind = "" if recipe.router == "linear" else f"-{recipe.router}"
            folder = self.work / f"calibrated-{start}-{self.name}-{seed}{kind}"
            if not (folder / "config.json").exists():
                model = self.base() if start == "base" else self.tuned(seed)
                transform(model, self.data(seed), self.budget, 0.5, recipe, seed).save_pretrained(folder)
            self._prepared = key, models.load(str(folder), self.work).to(DEVICE)
        return self._prepared[1]

    def samples(self, start: str, seed: int) -> Samples:
        """What the FFNs of the prepared model see on training text."""
        model = self.prepared(start, seed)
        if self._samples is None:
            blocks = calibration_blocks(self.data(seed), self.budget)[: SAMPLE_TOKENS // self.budget.length]
            batches = torch.split(blocks.to(model.device), self.budget.batch)
            self._samples = collect(model, batches, room=SAMPLE_TOKENS)
        return self._samples

    def run(self, cell: Cell) -> None:
        if cell.method in DENSE:
            self.add(cell, *self.dense(cell.method, cell.seed))
            return
        data, start = self.data(cell.seed), time.perf_counter()
        if cell.method in OURS:
            measured = self._lte(cell, data)
        elif cell.method == ONE_CHECKPOINT:
            measured = self._one_checkpoint(cell, data)
        elif cell.method in POST_HOC:
            measured = self._post_hoc(cell, data)
        else:
            measured = self._trained(cell, data)
        self.add(cell, measured, time.perf_counter() - start)
        gc.collect()

    def add(self, cell: Cell, measured: Measured, seconds: float) -> None:
        self.rows.add(
            cell,
            self.name,
            replace(self.budget, group_size=group_size(self.budget, self.recipe(cell.method))),
            measured,
            dense=self.better_dense(cell.seed),
            outside=self.data(cell.seed).outside,
            trained=cell.method != UNTUNED,
            seconds=seconds,
            where=machine(),
        )

    def _lte(self, cell: Cell, data: Data) -> Measured:
        """With cuts, part of what may not be read is left out entry by entry, and routers leave out less."""
        folder, cuts = self._folder(cell), CUTS.get(cell.method, Cuts())
        model = copy.deepcopy(self.prepared("base", cell.seed, cell.method))
        model = retarget(model, expert_sparsity(n_matrices(model._lte.sites[0]), cell.sparsity, cuts))
        options: dict[str, Any] = {"recipe": self.recipe(cell.method), "cuts": cuts}
        model, _ = tune_lte(model, data, self.budget, folder / "log", cell.seed, **options)
        model.save_pretrained(folder)
        return measure_cut(model, data.measured)

    def _folder(self, cell: Cell) -> Path:
        return self.work / f"{cell.method}-{self.name}-{cell.sparsity:g}-{cell.seed}"

    def _one_checkpoint(self, cell: Cell, data: Data) -> Measured:
        """Thresholds from the checkpoint's own table (`set_sparsity`), no training for this point."""
        first = Cell(FROM_ONE, self.preset.points[0], cell.seed)
        if not (self._folder(first) / "config.json").exists():
            self._lte(first, data)
        model = models.load(str(self._folder(first)), self.work).to(DEVICE)
        ltepass.set_sparsity(model, expert_sparsity(n_matrices(model._lte.sites[0]), cell.sparsity, CUTS[FROM_ONE]))
        return measure_cut(model, data.measured)

    def _post_hoc(self, cell: Cell, data: Data) -> Measured:
        if cell.method in STARTS:
            return self._start(cell, data)
        model, samples = self.prepared("tuned", cell.seed), self.samples("tuned", cell.seed)
        ruled = Ruled(model, RULES[cell.method], cell.sparsity)
        ruled.calibrate(samples)
        measured = measure_rule(ruled, data.measured)
        ruled.take_off()
        return measured

    def _start(self, cell: Cell, data: Data) -> Measured:
        """LTE at step 0: routers for the model as it is, or the warm start. Nothing but calibration blocks is used."""
        model = retarget(copy.deepcopy(self.prepared("tuned", cell.seed, cell.method)), cell.sparsity)
        blocks = calibration_blocks(data, self.budget).to(model.device)
        batches = torch.split(blocks, self.budget.batch)
        if cell.method in CALIBRATED_ONLY:
            ltepass.calibrate(model, batches, inputs="hard")
        else:
            warm_start(model, blocks)
            settle(model, batches[:: max(1, len(batches) // 8)], cell.sparsity)
        ltepass.set_mode(model, "hard")
        return measure_lte(model, data.measured)

    def _trained(self, cell: Cell, data: Data) -> Measured:
        model, samples = self.prepared("base", cell.seed), self.samples("base", cell.seed)
        ruled = Ruled(copy.deepcopy(model), RULES[cell.method], cell.sparsity)
        ruled.calibrate(samples)
        budget = replace(
            self.budget, learning_rate=self.preset.recipe.rate * self.budget.learning_rate
        )  # as LTE trains
        with ruled:
            tune_dense(ruled.model, data, budget, self.work / "log", cell.seed, ruled)
        blocks = torch.split(data.held_out.to(DEVICE), self.budget.batch)
        ruled.calibrate(collect(ruled.model, blocks))  # what is set on data follows
        return measure_rule(ruled, data.measured)


def machine() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{cpu_line()}, {torch.get_num_threads()} thread(s)"


def named_texts(given: Sequence[str]) -> dict[str, str]:
    """Of NAME=PATH. Raises BadParameter."""
    pairs = [word.partition("=") for word in given]
    for name, _, path in pairs:
        if not (name and Path(path).is_file()):
            raise typer.BadParameter(f"--other is {name!r} and {path!r}; expected NAME=PATH of a text")
    return {name: Path(path).read_text(errors="replace") for name, _, path in pairs}


def finish(rows: Rows, results: Path) -> None:
    """Table and plot from the rows."""
    write_table(rows.read(), results.with_suffix(".md"), Rows(results.with_name(results.name + "_time.csv")).read())
    write_plot(rows.read(), results.with_suffix(".svg"))
    print(results.with_suffix(".md").read_text())


def main(
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "smoke",
    texts: Annotated[Path | None, typer.Option(help="Folder of *.txt files; else text that ships with Python.")] = None,
    results: Annotated[Path, typer.Option(help="RESULTS.csv, .md and .svg are written.")] = Path("frontier"),
    work: Annotated[Path, typer.Option(help="Where trained models are kept.")] = Path("frontier-work"),
    only: Annotated[str, typer.Option(help="Methods, comma-separated; all if empty.")] = "",
    points: Annotated[str, typer.Option(help="Sparsities, comma-separated; the preset's if empty.")] = "",
    seeds: Annotated[int, typer.Option(help="How many; the preset's if 0.")] = 0,
    minutes: Annotated[float, typer.Option(help="Begin no cell after so many minutes.")] = 1e9,
    other: Annotated[list[str] | None, typer.Option(help="NAME=PATH: a text outside the training domain.")] = None,
) -> None:
    rows = Rows(results.with_suffix(".csv"))
    study = Frontier(preset, texts, work, rows, named_texts(other) if other else None)
    if seeds:
        study.preset = replace(study.preset, seeds=seeds)
    wanted = [c for c in cells(study.preset) if not only or c.method in only.split(",")]
    if points:
        wanted = [c for c in wanted if c.sparsity in (0.0, *map(float, points.split(",")))]
    start = time.perf_counter()
    for cell in wanted:
        if rows.has(cell, preset):
            continue
        if time.perf_counter() - start > 60 * minutes:
            break
        study.run(cell)
        print(f"{cell.method} {cell.sparsity:g} seed {cell.seed}: {time.perf_counter() - start:.0f} s", flush=True)
    finish(rows, results)


if __name__ == "__main__":
    typer.run(main)
