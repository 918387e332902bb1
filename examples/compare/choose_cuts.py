"""How much of what active experts read the cuts should leave out: perplexity on held-out text, before any training.

    python -m examples.compare.choose_cuts --preset cpu --texts FOLDER > examples/results/cuts.md
    python -m examples.compare.choose_cuts --preset smoke             a minute

Every pair of shares is measured at the same FFN sparsity: the more the cuts leave out, the less routers do. Cuts are
set on training blocks and measured on the blocks that thresholds settle on; no test text is looked at.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.compare.cuts import Cuts, expert_sparsity, n_matrices
from examples.compare.frontier import Frontier
from examples.compare.frontier_rows import Rows
from examples.compare.study import calibration_blocks, retarget
from ltepass.measure.quality import perplexity

HIDDEN = (0.0, 0.25, 0.4, 0.55, 0.7)
INPUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
BLOCKS = 16  # training blocks that a cut's sizes are taken from


def main(
    preset: Annotated[str, typer.Option(help="As in frontier.py.")] = "smoke",
    texts: Annotated[Path | None, typer.Option(help="Folder of *.txt files; else text that ships with Python.")] = None,
    work: Annotated[Path, typer.Option(help="Where models are kept.")] = Path("frontier-work"),
    sparsity: Annotated[float, typer.Option(help="Of the FFNs, experts and cuts together.")] = 0.5,
) -> None:
    study = Frontier(preset, texts, work, Rows(work / "none.csv"))
    base, budget, data = study.prepared("base", 0), study.budget, study.data(0)
    batches = torch.split(calibration_blocks(data, budget)[:BLOCKS].to(base.device), budget.batch)
    held_out = data.held_out.to(base.device)
    print("# What the cuts may leave out\n\nPrinted by `examples/compare/choose_cuts.py`, on held-out text.")
    print(f"Preset {preset}, FFN sparsity {sparsity:.0%}, {held_out.numel()} tokens, torch {torch.__version__}.")
    print(f"Cuts are placed by random rows of {BLOCKS} training blocks.")
    print("Perplexity, calibrated and not trained, by share of the inputs (rows) and of hidden units (columns).\n")
    print("| inputs | " + " | ".join(f"{h:.0%}" for h in HIDDEN) + " |\n|---|" + "---|" * len(HIDDEN))
    found: dict[Cuts, float] = {}
    for inputs in INPUTS:
        row = []
        for hidden in HIDDEN:
            cuts = Cuts(hidden=hidden, inputs=inputs)
            matrices = n_matrices(base._lte.sites[0])
            if cuts.kept(matrices) < 1 - sparsity:  # more than was asked for, with every expert active
                row.append("")
                continue
            model = retarget(copy.deepcopy(base), expert_sparsity(matrices, sparsity, cuts))
            cuts.apply(model, batches)
            found[cuts] = perplexity(model, held_out)
            row.append(f"{found[cuts]:.2f}")
        print(f"| {inputs:.0%} | " + " | ".join(row) + " |", flush=True)
    print()
    for what, pairs in (("hidden units alone", [c for c in found if not c.inputs]), ("both", list(found))):
        best = min(pairs, key=found.__getitem__)
        print(f"Least of {what}: {best.hidden:.0%} of hidden units, {best.inputs:.0%} of inputs, {found[best]:.2f}.")


if __name__ == "__main__":
    typer.run(main)
