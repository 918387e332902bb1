"""What a start costs and what it gives, before any training: our routers against MoEfication's post-hoc MLP routers.

    python -m examples.compare.start_cost --preset smoke                  half a minute: a tiny model
    python -m examples.compare.start_cost --preset cpu --texts FOLDER --points 0.5,0.7,0.8,0.9,0.95
                                          SmolLM2-135M, forty minutes on a core once `frontier.py` has tuned the model

Seconds are from the dense model, whose groups are in place, to routers in hard mode: every pass and every fit. All
starts take turns in one process, once per sparsity, on the same tokens of the dense model fine-tuned as in
`frontier.py`. What they give is compared at the bytes that MoEfication reads. Its MLPs are also fitted in a quarter of
their steps: what it costs is ours to choose, and what it gives for less says whether we chose fairly.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import ltepass
from examples.compare.frontier import Frontier, machine
from examples.compare.frontier_rows import Point, Row, Rows, shown_at, write_rows
from examples.compare.measured import Measured, measure_lte, measure_rule, perplexities
from examples.compare.predictors import MoEfication
from examples.compare.rule_hooks import Ruled, collect
from examples.compare.study import DEVICE, retarget

FIELDS = "preset start tokens sparsity seconds text bytes_share ratio_to_dense machine torch".split()
BASELINE = "moefication"
FULL, QUICK = MoEfication.steps, MoEfication.steps // 4
BATCH_TOKENS = 512  # of what is fitted on


def moefication(model: Any, batches: Sequence[Tensor], sparsity: float, steps: int) -> Callable[[Any], Measured]:
    samples = collect(model, batches, room=sum(map(Tensor.numel, batches)))
    ruled = Ruled(model, type("Fitted", (MoEfication,), {"steps": steps}), sparsity)
    ruled.calibrate(samples)
    return lambda test: measure_rule(ruled, test)


def ours(model: Any, batches: Sequence[Tensor], inputs: Any) -> Callable[[Any], Measured]:
    ltepass.calibrate(model, batches, inputs=inputs)
    ltepass.set_mode(model, "hard")
    return lambda test: measure_lte(model, test)


STARTS: dict[str, Callable[[Any, Sequence[Tensor], float], Callable[[Any], Measured]]] = {
    BASELINE: lambda model, batches, sparsity: moefication(model, batches, sparsity, FULL),
    f"{BASELINE}, {QUICK} steps": lambda model, batches, sparsity: moefication(model, batches, sparsity, QUICK),
    "lte, dense inputs": lambda model, batches, _: ours(model, batches, "dense"),
    "lte, hard inputs": lambda model, batches, _: ours(model, batches, "hard"),
}


def measure(study: Frontier, counts: Sequence[int], points: Sequence[float]) -> list[Row]:
    """Seed 0. counts: tokens that a start gets."""
    data, length = study.data(0), study.budget.length
    dense = perplexities(study.tuned(0), data.test)
    rows = []
    for count in counts:
        if count % length or count > data.train.numel():
            raise ValueError(
                f"a start was to get {count} tokens; expected blocks of {length} from {data.train.numel()} tokens; "
                "pass --tokens"
            )
    names = list(STARTS)
    for turn, (sparsity, count) in enumerate(itertools.product(points, counts)):
        batches = torch.split(data.train[: count // length].to(DEVICE), max(1, BATCH_TOKENS // length))
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            model = retarget(copy.deepcopy(study.prepared("tuned", 0)), sparsity)
            ltepass.set_mode(model, "dense")
            _wait()
            begun = time.perf_counter()
            finish = STARTS[name](model, batches, sparsity)
            _wait()
            seconds = time.perf_counter() - begun
            measured = finish(data.test)
            print(f"{name}, {count} tokens, {sparsity:.0%}: {seconds:.1f} s", flush=True)
            rows += [
                {
                    "preset": study.name, "start": name, "tokens": str(count), "sparsity": f"{sparsity:g}",
                    "seconds": f"{seconds:.3f}", "text": text, "bytes_share": f"{found.bytes_share:.4f}",
                    "ratio_to_dense": f"{found.perplexity() / dense[text]:.4f}", "machine": machine(),
                    "torch": torch.__version__,
                }
                for text, found in measured.items()
            ]  # fmt: skip
    return rows


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: Sequence[Row]) -> list[str]:
    """A section for each preset, machine and text."""
    lines = ["# What a start costs", "", "Made by `examples/compare/start_cost.py` from the CSV beside it."]
    for preset, where, text in sorted({(r["preset"], r["machine"], r["text"]) for r in rows}):
        here = [r for r in rows if (r["preset"], r["machine"], r["text"]) == (preset, where, text)]
        shares = sorted({float(r["bytes_share"]) for r in here if r["start"] == BASELINE}, reverse=True)
        lines += [
            "",
            f"## {text}, preset {preset}",
            "",
            f"{where}; torch {here[0]['torch']}. {BASELINE} fits MLPs in {FULL} steps of {MoEfication.batch} tokens at "
            f"each FFN. Seconds are medians (least .. most) over "
            f"{len({r['sparsity'] for r in here})} sparsities, the ratio that of each round; perplexity over the tuned "
            f"dense model's at the bytes that {BASELINE} reads (- is outside the measured points).",
            "",
            f"| start | tokens | seconds | of {BASELINE}'s | " + " | ".join(f"{b:.1%}" for b in shares) + " |",
            "|---|---|---|---|" + "---|" * len(shares),
        ]
        for count in sorted({r["tokens"] for r in here}, key=int):
            taken = {r["sparsity"]: float(r["seconds"]) for r in here if (r["start"], r["tokens"]) == (BASELINE, count)}
            for name in STARTS:
                own = [r for r in here if (r["start"], r["tokens"]) == (name, count)]
                seconds = [float(r["seconds"]) for r in own]
                shown = statistics.median(s / taken[r["sparsity"]] for s, r in zip(seconds, own, strict=True))
                curve: list[Point] = [(float(r["bytes_share"]), float(r["ratio_to_dense"])) for r in own]
                cells = [f"{statistics.median(seconds):.1f} ({min(seconds):.1f} .. {max(seconds):.1f})", f"{shown:.2f}"]
                cells += [shown_at([*curve, (1.0, 1.0)], share) for share in shares]
                lines.append(f"| {name} | {int(count):,} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Row) -> tuple[str, ...]:
    return row["preset"], row["machine"], row["start"], row["tokens"], row["sparsity"]


def main(
    preset: Annotated[str, typer.Option(help="Of frontier.py.")] = "smoke",
    texts: Annotated[Path | None, typer.Option(help="Folder of *.txt files; else text that ships with Python.")] = None,
    tokens: Annotated[str, typer.Option(help="That a start gets, comma-separated.")] = "2048,4096",
    points: Annotated[str, typer.Option(help="Sparsities, comma-separated; the preset's if empty.")] = "",
    results: Annotated[Path, typer.Option(help="RESULTS.csv and .md; other rows stay.")] = Path("start_cost"),
    work: Annotated[Path, typer.Option(help="Where trained models are kept.")] = Path("frontier-work"),
) -> None:
    study = Frontier(preset, texts, work, Rows(Path()))
    wanted = list(map(float, points.split(","))) if points else study.preset.points
    rows = measure(study, list(map(int, tokens.split(","))), wanted)
    path, again = results.with_suffix(".csv"), set(map(_cell, rows))
    kept = [r for r in Rows(path).read() if _cell(r) not in again]
    write_rows(path, FIELDS, [*kept, *rows])
    results.with_suffix(".md").write_text("\n".join(table([*kept, *rows])) + "\n")
    print(results.with_suffix(".md").read_text())


if __name__ == "__main__":
    typer.run(main)
