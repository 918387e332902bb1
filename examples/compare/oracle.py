"""What groups of neurons cost before any training: perplexity of a dense model that keeps the experts an oracle picks.

    python -m examples.compare.oracle --model smollm2 --text FILE > examples/results/oracle.md
    python -m examples.compare.oracle --model tiny                  seconds

Groups are made from the first SAMPLE_TOKENS / CALIBRATION tokens of each calibration block. The oracle knows every
expert's energy, sum (h_j |down_j|)^2, and keeps the largest of each token. Untrained groups are poor even so; which
grouping is least so is what the grouping methods are judged by.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import ltepass
from examples.compare import models
from examples.compare.rule_hooks import Ruled
from examples.compare.rules import Rule, Seen, top
from ltepass.calibration.energy import down_energy
from ltepass.corpora import python_docs, token_blocks
from ltepass.measure.quality import perplexity
from ltepass.passes.group.group_neurons import site_permutation
from ltepass.routed.routed import Routed
from ltepass.routed.samples import SAMPLE_TOKENS, Sample, collect

CALIBRATION, LENGTH = 8, 512
ROWS = (
    ("identity", 1),
    ("coactivation", 8), ("output_aware", 8), ("kmeans", 8),
    ("coactivation", 32), ("output_aware", 32), ("kmeans", 32), ("random", 32), ("identity", 32),
)  # fmt: skip


class OracleGroups(Rule):
    """Keeps whole groups of a permutation, whatever groups the model has."""

    name, deployable = "oracle-groups", False

    def group(self, permutation: Tensor, group_size: int, down_square: Tensor) -> None:
        self.permutation, self.group_size, self.down_square = permutation, group_size, down_square

    def factors(self, seen: Seen) -> Tensor:
        energy = (seen.h.float().square() * self.down_square)[..., self.permutation]
        energy = energy.unflatten(-1, (-1, self.group_size)).sum(-1)
        kept = top(energy, max(1, round((1 - self.sparsity) * energy.shape[-1])))
        factors = torch.empty_like(seen.h)
        factors[..., self.permutation] = kept.repeat_interleave(self.group_size, -1).to(seen.h.dtype)
        return factors


def groups(model: Any, samples: dict[str, Sample], method: str, group_size: int) -> list[Tensor]:
    """A permutation of each site's neurons."""
    sites = [dataclasses.replace(site, group_size=group_size) for site in model._lte.sites]
    return [site_permutation(model, site, method, samples[site.name], seed=0) for site in sites]


def oracle_perplexity(
    model: torch.nn.Module, permutations: list[Tensor], test: Tensor, group_size: int, sparsity: float
) -> float:
    ruled = Ruled(model, OracleGroups, sparsity)
    for rule, site, permutation in zip(ruled.rules, ruled.sites, permutations, strict=True):
        assert isinstance(rule, OracleGroups)
        rule.group(permutation, group_size, down_energy(model, site))
    with ruled:
        out = perplexity(model.eval(), test)
    ruled.take_off()
    return out


def main(
    model: Annotated[str, typer.Option(help="smollm2, tiny or a directory.")] = "tiny",
    text: Annotated[Path | None, typer.Option(help="Text to measure on; else the Python reference.")] = None,
    sparsities: Annotated[str, typer.Option(help="Comma-separated.")] = "0.5,0.7",
    blocks: Annotated[int, typer.Option(help="Blocks of 512 tokens to measure on, at each place.")] = 4,
    places: Annotated[str, typer.Option(help="Where in the text to measure, as shares of it.")] = "0.95",
    work: Annotated[Path, typer.Option(help="Where a tiny model is kept.")] = Path("frontier-work"),
) -> None:
    tokenizer = models.tokenizer(model)
    whole = "".join(python_docs()) if text is None else text.read_text(errors="replace")
    first = whole[: 40 * CALIBRATION * LENGTH]
    calibration = token_blocks(tokenizer, first, LENGTH, CALIBRATION)
    dense = models.load(model, work, token_blocks(tokenizer, whole[:400_000], 128))
    tests: dict[str, Tensor] = {}
    for place in places.split(","):
        at = int(float(place) * len(whole))
        tests[place] = token_blocks(tokenizer, whole[at : at + 40 * blocks * LENGTH], LENGTH, blocks)
        if at < len(first) or len(tests[place]) < blocks:
            raise ValueError(
                f"{place} of the text leaves {len(tests[place])} blocks; expected {blocks} after the "
                f"{len(first)} characters that groups are made from; move it or give a longer text"
            )
    best = {place: perplexity(dense, test) for place, test in tests.items()}
    where = text.stem if text else "the Python reference"
    print("# What an oracle's groups of neurons cost before any training\n\nPrinted by `examples/compare/oracle.py`.")
    print(f"{model}, {blocks} x {LENGTH} tokens from each place in {where} (as a share of it);", end=" ")
    print(f"torch {torch.__version__}.\nPerplexity, over the dense model's at the same place.\n")
    ltepass.transform(dense, config=ltepass.LTEConfig(grouping="identity"))
    some = calibration[:, : SAMPLE_TOKENS // CALIBRATION].split(1)  # of every block
    samples = collect(Routed.trained(dense, "the oracle"), some)
    wanted = [(place, float(s)) for s in sparsities.split(",") for place in tests]
    print(
        "| experts | " + " | ".join(f"{s:.0%} at {place}" for place, s in wanted) + " |\n|---|" + "---|" * len(wanted)
    )
    print("| dense, perplexity | " + " | ".join(f"{best[place]:.2f}" for place, _ in wanted) + " |")
    for method, size in ROWS:
        permutations = groups(dense, samples, method, size)
        values = [oracle_perplexity(dense, permutations, tests[place], size, s) / best[place] for place, s in wanted]
        name = "single neurons" if size == 1 else f"of {size}, {method}"
        print(f"| {name} | " + " | ".join(f"x{v:.2f}" for v in values) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
