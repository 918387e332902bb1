"""The paper's ablations and ours, each variant at the same tokens, in one table; sparsity per layer in the rows.

    python -m examples.compare.ablations                          the tiny model, two seeds, about ten minutes
    python -m examples.compare.ablations --preset smoke           two variants of each in a minute
    python -m examples.compare.ablations --preset small --texts FOLDER --only stages   SmolLM2-135M

Rows go to RESULTS.csv as they are measured; what stands there is not run again.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import ltepass
from examples.compare.frontier_rows import spread_of
from examples.compare.measured import Measured, geometric_mean, measure_lte, measure_rule, perplexities
from examples.compare.methods import RULES
from examples.compare.presets import PRESETS
from examples.compare.rule_hooks import Ruled, collect
from examples.compare.study import Data, Recipe, transform
from examples.compare.tuning import tune_dense, tune_lte
from examples.compare.workshop import Workshop

HALF = 0.5  # of the steps in the soft stage, where a variant needs one
BASE = Recipe(soft_share=HALF, warm=False)  # the paper's two stages, from a calibrated start
VARIANTS: dict[str, dict[str, Recipe]] = {
    "separability coefficient": {
        f"{lam:g}": dataclasses.replace(BASE, settings={"lam": lam}) for lam in (0.0, 0.5, 1.0)
    },
    "routers": {
        "trained": BASE,
        "calibrated, frozen": dataclasses.replace(BASE, soft_share=0.0),
        "random, frozen": dataclasses.replace(BASE, soft_share=0.0, random_routers=True),
        "random, trained": dataclasses.replace(BASE, random_routers=True),
    },
    "grouping": {
        name: dataclasses.replace(BASE, grouping=name) for name in ("coactivation", "output_aware", "kmeans", "random")
    },
    "group size": {str(size): dataclasses.replace(BASE, group_size=size) for size in (8, 16, 32, 64)},
    "stages": {
        "both": BASE,
        "soft only": dataclasses.replace(BASE, soft_share=1.0),
        "hard only": dataclasses.replace(BASE, soft_share=0.0),
        "hard only, warm start": Recipe(),
        "both, warm start": dataclasses.replace(BASE, warm=True),
    },
    "recipe": {
        "calibrated": Recipe(warm=False),
        "warm start": Recipe(),
        "one budget": Recipe(warm=False, budget="model"),
        "one budget, warm start": Recipe(budget="model"),
        "one budget, warm start, experts of 4": Recipe(budget="model", group_size=4),
        "one budget, warm start, 2 x learning rate": Recipe(budget="model", rate=2.0),
        "one budget, warm start, half distillation": Recipe(budget="model", settings={"distill": 0.5}),
        "one budget, warm start, straight-through": Recipe(budget="model", settings={"straight_through": True}),
        "one budget, warm start, a quarter soft": Recipe(budget="model", soft_share=0.25),
    },
    "start": {
        "on all training tokens": Recipe(budget="model"),
        "on a quarter of them": Recipe(budget="model", start=0.25),
        "routers on all, no warm start": Recipe(budget="model", warm=False),
        "an oracle's experts, no warm start": Recipe(oracle=True),
    },
    "hard stage": {
        "all weights": Recipe(),
        "all, straight-through routers": Recipe(settings={"straight_through": True}),
        "LoRA on the FFN": Recipe(settings={"trainable": "lora"}),
        "routers only": Recipe(settings={"trainable": "routers"}),
        "half distillation": Recipe(settings={"distill": 0.5}),
        "distillation only": Recipe(settings={"distill": 1.0}),
        "thresholds not held": Recipe(settings={"hold": False}),
    },
    "teacher": {
        "labels alone": Recipe(),
        "half labels, half the model as it came": Recipe(settings={"distill": 0.5}),
        "the model as it came alone": Recipe(settings={"distill": 1.0}),
        "half labels, half the tuned model": Recipe(settings={"distill": 0.5}, tuned_teacher=True),
        "the tuned model alone": Recipe(settings={"distill": 1.0}, tuned_teacher=True),
        "proxies, labels alone": Recipe(router="proxy"),
        "proxies, half labels, half the tuned model": Recipe(
            router="proxy", settings={"distill": 0.5}, tuned_teacher=True
        ),
    },
    "budget": {name: dataclasses.replace(BASE, budget=name) for name in ("layer", "model")},
    "union term": {f"{u:g}": dataclasses.replace(BASE, settings={"union": u}) for u in (0.0, 5.0)},
}
FIELDS = (
    "preset ablation variant seed target tokens ratio perplexity ffn_sparsity bytes_share per_layer seconds".split()
)


class Study(Workshop):
    def __init__(self, preset: str, texts: Path | None, work: Path, path: Path, sparsity: float) -> None:
        super().__init__(preset, PRESETS[preset].budget, texts, work)
        self.path, self.sparsity = path, sparsity
        self._dense: dict[int, float] = {}

    def dense(self, seed: int) -> float:
        """Mean perplexity (geometric, over texts) of the dense model tuned on the same tokens."""
        if seed not in self._dense:
            measured = perplexities(self.tuned(seed), self.data(seed).test)
            self._dense[seed] = geometric_mean(list(measured.values()))
        return self._dense[seed]

    def run(self, ablation: str, variant: str, seed: int) -> None:
        recipe, data, start = VARIANTS[ablation][variant], self.data(seed), time.perf_counter()
        model = transform(self.base(), data, self.budget, self.sparsity, recipe, seed)
        if recipe.oracle:
            measured, per_layer = self._oracle(model, data, seed), {"": self.sparsity}
        else:
            teacher = self.tuned(seed) if recipe.tuned_teacher else None
            log = self.work / "log"
            model, _ = tune_lte(model, data, self.budget, log, seed, recipe=recipe, teacher=teacher)
            measured = measure_lte(model, data.test)
            per_layer = ltepass.measure_sparsity(model, torch.cat(list(data.test.values()))[:, None].to(model.device))
        quality = geometric_mean([found.perplexity() for found in measured.values()])
        row = {
            "preset": self.name,
            "ablation": ablation,
            "variant": variant,
            "seed": seed,
            "target": f"{self.sparsity:g}",
            "tokens": self.budget.tokens,
            "ratio": f"{quality / self.dense(seed):.4f}",
            "perplexity": f"{quality:.4f}",
            "ffn_sparsity": f"{statistics.fmean(found.sparsity for found in measured.values()):.4f}",
            "bytes_share": f"{statistics.fmean(found.bytes_share for found in measured.values()):.4f}",
            "per_layer": json.dumps([round(v, 4) for v in per_layer.values()]),
            "seconds": f"{time.perf_counter() - start:.0f}",
        }
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _oracle(self, model: Any, data: Data, seed: int) -> Measured:
        """Trained like LTE's hard stage, under a rule that needs to know every expert's energy."""
        ruled = Ruled(model, RULES["oracle"], self.sparsity)
        ruled.calibrate(collect(model, [data.train[: self.budget.batch].to(model.device)]))
        with ruled:
            tune_dense(model, data, self.budget, self.work / "log", seed, ruled)
        return measure_rule(ruled, data.test)

    def done(self) -> set[tuple[str, str, str, str, str]]:
        return {(r["preset"], r["ablation"], r["variant"], r["seed"], r["target"]) for r in read_rows(self.path)}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write_table(rows: list[dict[str, str]], path: Path) -> None:
    lines = [
        "# Ablations",
        "",
        "Made by `examples/compare/ablations.py` from the CSV beside it; nothing here is typed.",
    ]
    lines += [
        "Perplexity (geometric mean over three texts) over the dense model's, tuned on the same tokens; seeds' range."
    ]
    for preset, target in sorted({(r["preset"], r["target"]) for r in rows}):
        here = [r for r in rows if (r["preset"], r["target"]) == (preset, target)]
        lines += ["", f"## Preset {preset}, target {float(target):.0%}, {int(here[0]['tokens']):,} tokens", ""]
        lines += ["| ablation | variant | x dense | FFN sparsity | bytes read | layers, least .. most | seeds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for ablation, variants in VARIANTS.items():
            for variant in variants:
                cell = [r for r in here if (r["ablation"], r["variant"]) == (ablation, variant)]
                if cell:
                    lines.append(_line(ablation, variant, cell))
    path.write_text("\n".join(lines) + "\n")


def _line(ablation: str, variant: str, cell: list[dict[str, str]]) -> str:
    mean = {f: statistics.fmean(float(r[f]) for r in cell) for f in ("ffn_sparsity", "bytes_share")}
    layers = [v for r in cell for v in json.loads(r["per_layer"])]
    ratio = spread_of([float(r["ratio"]) for r in cell])
    return (
        f"| {ablation} | {variant} | {ratio} | {mean['ffn_sparsity']:.1%} | {mean['bytes_share']:.1%} | "
        f"{min(layers):.0%} .. {max(layers):.0%} | {len(cell)} |"
    )


def write_layers(rows: list[dict[str, str]], path: Path) -> None:
    """Sparsity per layer: the first seed of the paper's two stages under either budget."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "ltepass"
    shown = [r for r in rows if r["ablation"] == "budget" and r["seed"] == "0"]
    if not shown:
        return
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for row in shown:
        label = f"budget by {row['variant']}, target {float(row['target']):.0%} ({row['preset']})"
        axes.plot(json.loads(row["per_layer"]), marker="o", markersize=3, label=label)
    axes.set_xlabel("FFN site")
    axes.set_ylabel("inactive neurons")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main(
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "ablation",
    texts: Annotated[Path | None, typer.Option(help="Folder of *.txt files; else text that ships with Python.")] = None,
    results: Annotated[Path, typer.Option(help="RESULTS.csv, .md and .svg are written.")] = Path("ablations"),
    work: Annotated[Path, typer.Option(help="Where trained models are kept.")] = Path("frontier-work"),
    only: Annotated[str, typer.Option(help="Ablations, comma-separated; all if empty.")] = "",
    variant: Annotated[str, typer.Option(help="One variant of each; all if empty.")] = "",
    sparsity: Annotated[float, typer.Option(help="Target.")] = 0.7,
    seeds: Annotated[int, typer.Option(help="How many.")] = 2,
    minutes: Annotated[float, typer.Option(help="Begin nothing after so many minutes.")] = 1e9,
) -> None:
    path, start = results.with_suffix(".csv"), time.perf_counter()
    study = Study(preset, texts, work, path, sparsity)
    for seed in range(seeds):
        for ablation, variants in VARIANTS.items():
            for name in variants:
                key = (preset, ablation, name, str(seed), f"{sparsity:g}")
                skip = (
                    (only and ablation not in only.split(",")) or (variant and name != variant) or key in study.done()
                )
                if skip or time.perf_counter() - start > 60 * minutes:
                    continue
                study.run(ablation, name, seed)
                print(f"{ablation}, {name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    write_table(read_rows(path), results.with_suffix(".md"))
    write_layers(read_rows(path), results.with_suffix(".svg"))
    print(results.with_suffix(".md").read_text())


if __name__ == "__main__":
    typer.run(main)
