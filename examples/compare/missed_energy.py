"""What a choice of experts misses, by who chooses: how much of LTE's loss a better router could take back.

    python -m examples.compare.missed_energy                                        a tiny model, seconds
    python -m examples.compare.missed_energy --preset small --texts FOLDER --results examples/results/missed_energy

At each token of the test slices the best experts are kept, by one of four scores, and the energy of the others,
sum of (h_j |down_j|)^2, is missed: a row has the mean of its share. No weight is trained; predictors are fitted on all
training tokens. `linear + MLP` is LTE's router with a network of 1,024 hidden units fitted to what it leaves.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from examples.compare.presets import PRESETS
from examples.compare.rules import top
from examples.compare.study import DEVICE, Recipe, transform
from examples.compare.workshop import Workshop
from ltepass.calibration.energy import down_energy, expert_energy
from ltepass.calibration.ridge import RidgeSums
from ltepass.routed.observers import Observer, watch
from ltepass.routed.routed import Routed
from ltepass.routed.samples import SAMPLE_TOKENS
from ltepass.routed.sites import FFNSite

FIELDS = "preset site chooser sparsity missed train_tokens test_tokens".split()
HIDDEN, EPOCHS, BATCH, RATE = 1024, 20, 512, 1e-3
Score = Callable[[Tensor], Tensor]  # x [n, d_model] -> [n, n_experts]


class Keep(Observer):
    """Every token's input x and experts' energies at one site."""

    def __init__(self, routed: Routed, site: FFNSite) -> None:
        super().__init__(site, routed.router(site))
        self.weights = down_energy(routed.model, site)
        self.x: list[Tensor] = []
        self.energy: list[Tensor] = []

    def on_input(self, x: Tensor) -> None:
        self.x.append(x.float().clone())

    def on_hidden(self, h: Tensor) -> None:
        self.energy.append(expert_energy(self.site, h, self.weights))

    def rows(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.x), torch.cat(self.energy)


def observe(model: Any, sites: list[FFNSite], batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each site: x [n, d_model], energies [n, n_experts]."""
    routed = Routed.trained(model, "observe")
    kept = [Keep(routed, site) for site in sites]
    watch(routed, batches, kept)
    return [k.rows() for k in kept]


def linear(x: Tensor, target: Tensor) -> Score:
    sums = RidgeSums()
    sums.add(x, target)
    weight, bias = sums.solve()
    return lambda rows: rows @ weight.T + bias


def with_mlp(x: Tensor, target: Tensor) -> Score:
    """The linear fit, and a network fitted to its residual."""
    first, scale = linear(x, target), x.std(0).clamp_min(1e-6)
    torch.manual_seed(0)
    inner, outer = nn.Linear(x.shape[1], HIDDEN), nn.Linear(HIDDEN, target.shape[1])
    nn.init.zeros_(outer.weight)
    nn.init.zeros_(outer.bias)
    net = nn.Sequential(inner, nn.GELU(), outer).to(x.device)
    residual, inputs = target - first(x), x / scale
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.05)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            loss = (net(inputs[rows]) - residual[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return torch.no_grad()(lambda rows: first(rows) + net(rows / scale))


def missed(score: Tensor, energy: Tensor, sparsity: float) -> float:
    """Mean over tokens of the share of energy outside the kept experts."""
    kept = top(score, max(1, round((1 - sparsity) * score.shape[-1])))
    return float(1 - ((energy * kept).sum(-1) / energy.sum(-1).clamp_min(1e-30)).mean())


def scores(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """By chooser: scores of the test tokens [n, n_experts]."""
    (x, energy), (x_test, energy_test) = train, test
    target = energy.clamp_min(1e-12).log()
    return {
        "oracle": energy_test,
        "linear + MLP": with_mlp(x, target)(x_test),
        "linear (LTE's router)": linear(x, target)(x_test),
        "the same for every token": target.mean(0).expand_as(energy_test),
    }


def write_table(rows: list[dict[str, str]], path: Path) -> None:
    lines = [
        "# Energy missed",
        "",
        "Made by `examples/compare/missed_energy.py` from the CSV beside it; nothing is typed.",
    ]
    sites = list(dict.fromkeys(r["site"] for r in rows))
    first = rows[0]
    lines += [
        "",
        f"Preset {first['preset']}, {float(first['sparsity']):.0%} of the experts left out; fitted on "
        f"{int(first['train_tokens']):,} tokens, measured on {int(first['test_tokens']):,} others; no weight trained.",
        "",
        f"| who chooses | {' | '.join(sites)} | mean |",
        "|---|" + "---|" * (len(sites) + 1),
    ]
    for chooser in dict.fromkeys(r["chooser"] for r in rows):
        values = [float(r["missed"]) for s in sites for r in rows if (r["chooser"], r["site"]) == (chooser, s)]
        lines.append(f"| {chooser} | {' | '.join(f'{v:.1%}' for v in [*values, statistics.fmean(values)])} |")
    path.write_text("\n".join(lines) + "\n")


def main(
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "smoke",
    texts: Annotated[Path | None, typer.Option(help="Folder of *.txt files; else text that ships with Python.")] = None,
    results: Annotated[Path, typer.Option(help="RESULTS.csv and .md are written.")] = Path("missed_energy"),
    work: Annotated[Path, typer.Option(help="Where a tiny model is kept.")] = Path("frontier-work"),
    sparsity: Annotated[float, typer.Option(help="Share of experts left out.")] = 0.5,
    sites: Annotated[int, typer.Option(help="How many FFNs, evenly spread.")] = 3,
) -> None:
    study = Workshop(preset, PRESETS[preset].budget, texts, work)
    data, budget = study.data(0), study.budget
    share = SAMPLE_TOKENS / (budget.calibration * budget.length)  # groups need no more
    model = transform(study.base(), data, budget, sparsity, Recipe(start=min(1.0, share)), seed=0)
    every = model._lte.sites
    chosen = [every[(2 * i + 1) * len(every) // (2 * sites)] for i in range(sites)]
    train = observe(model, chosen, list(torch.split(data.train.to(DEVICE), budget.batch)))
    test = observe(model, chosen, [blocks.to(DEVICE) for blocks in data.test.values()])
    rows = []
    for site, seen, new in zip(chosen, train, test, strict=True):
        for chooser, score in scores(seen, new).items():
            row = (preset, site.name, chooser, f"{sparsity:g}", f"{missed(score, new[1], sparsity):.4f}")
            rows.append(dict(zip(FIELDS, (*row, str(len(seen[0])), str(len(new[0]))), strict=True)))
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_table(rows, results.with_suffix(".md"))
    print(results.with_suffix(".md").read_text())


if __name__ == "__main__":
    typer.run(main)
