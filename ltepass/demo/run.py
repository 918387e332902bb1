"""Runs the stages that have not finished yet, says what it does, and prints the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from ltepass.demo import stages
from ltepass.demo.options import DemoOptions
from ltepass.demo.page import page
from ltepass.demo.results import Folder, Results, StageName
from ltepass.demo.stages import Demo
from ltepass.demo.table import rich_table
from ltepass.measure.memory import peak_memory

Stage = tuple[StageName, str, Callable[[Demo], Mapping[str, object]]]

STAGES: tuple[Stage, ...] = (
    ("prepare", "load the model and the texts", stages.prepare),
    ("dense", "perplexity of the dense model", stages.dense),
    ("tune_dense", "fine-tune the dense model, for a fair comparison", stages.tune_dense),
    (
        "calibrate",
        "transform: find the FFNs, group their neurons, start the routers",
        stages.calibrate,
    ),
    ("train", "train what its routers leave to train, and place thresholds", stages.train),
    ("quality", "perplexity and sparsity of the saved model", stages.quality),
    ("speed", "time decoding: dense and lowered take turns", stages.measure_speed),
    ("generate", "continue a prompt with both", stages.generate),
    ("reload", "load the saved model in a new process", stages.reload_elsewhere),
)


def run_demo(options: DemoOptions, out: Path, *, fresh: bool = False, console: Console | None = None) -> Results:
    """All stages; returns what results.json holds. After Ctrl-C the same call goes on where this one stopped.

    Raises ConfigError where `out` holds a run with other options.
    """
    console = console or Console()
    transformers_logging.disable_progress_bar()  # ours says what takes time
    folder = Folder(out, options, fresh=fresh)
    demo = Demo(options, folder, console)
    for number, (name, what, stage) in enumerate(STAGES, 1):
        label = f"[{number}/{len(STAGES)}] {what}"
        if folder.finished(name):
            console.print(f"{label}: done before", markup=False, highlight=False)
            continue
        console.print(label, markup=False, highlight=False)
        start = time.perf_counter()
        result = stage(demo)
        folder.finish(name, {**result, "peak_gb": round(peak_memory() / 1e9, 2)}, time.perf_counter() - start)
    (out / "report.html").write_text(page(folder.results))
    _show(demo)
    return folder.results


def _show(demo: Demo) -> None:
    """The table on the console, and both continuations."""
    console, results, out = demo.console, demo.folder.results, demo.folder.path
    generated = results["stages"]["generate"]
    console.print(rich_table(results))
    console.print(f"prompt:  {generated['prompt']}", markup=False, highlight=False)
    console.print(f"dense:   {generated['dense']!r}", markup=False, highlight=False)
    console.print(f"lowered: {generated['lowered']!r}", markup=False, highlight=False)
    console.print(f"go on:   ltepass generate {out}/lte {generated['prompt']!r}", markup=False, highlight=False)
    console.print(f"model: {out}/lte   numbers: {out}/results.json   page: {out}/report.html", highlight=False)
