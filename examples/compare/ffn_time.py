"""Measured time of one FFN at one token, by how a method skips: the frontier's third view, beside sparsity and bytes.

    python -m examples.compare.ffn_time --results examples/results/frontier_time.csv          SmolLM2-135M's shape

Every way takes turns with the others, its weights cold, as in `ltepass bench op`. LTE and every other method that picks
experts with a linear router run on our kernel, `lte+teal` and `lte+cuts` with cuts as in their rows; so does TEAL,
which is the cuts with every expert on (the kernel reads a router for it, 4 % of the bytes at groups of 8).
MoEfication's network runs in PyTorch, and the experts it chose on our kernel (with a router as well). Deja Vu and CATS
are a few lines of PyTorch each: their authors' kernels are for GPUs; measured here is what one can run on a CPU today.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from examples.bench import ways
from examples.bench.ways import Shape, Weights
from examples.compare.cuts import CUTS, expert_sparsity
from examples.compare.frontier_page import WAYS
from ltepass.measure.machine import machine
from ltepass.measure.timing import Contender, copies_needed, interleaved

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FIELDS = "way d_model d_ff group_size dtype threads sparsity median_ms p20_ms p80_ms repeats machine torch".split()


def predicted(shape: Shape, weights: list[Weights], sparsity: float, rank: int, *, neurons: bool) -> Contender:
    """A two-layer network picks the largest k of its outputs; then only those neurons are computed."""
    routed = None if neurons else ways.routed(shape, weights, sparsity)
    gathered = ways.index_select(shape, weights, sparsity)
    outputs = shape.d_ff if neurons else shape.n_experts
    k = max(1, round((1 - sparsity) * outputs))
    nets = [
        nn.Sequential(nn.Linear(shape.d_model, rank, bias=False), nn.Tanh(), nn.Linear(rank, outputs)) for _ in weights
    ]
    x = ways.decide(shape, sparsity).x

    def call(i: int) -> Tensor:
        nets[i % len(nets)](x).topk(k, sorted=False)
        return (gathered if routed is None else routed)(i)  # type: ignore[return-value]

    return call


def contenders(shape: Shape) -> dict[tuple[str, float], Contender]:
    weights = ways.make_weights(shape, copies_needed(shape.weight_bytes * (1 - max(SPARSITIES)), 16))
    out: dict[tuple[str, float], Contender] = {
        ("dense eager", 0.0): ways.dense_eager(shape, weights),
        ("dense compiled", 0.0): ways.dense_compiled(shape, weights),
        ("routed", 0.0): ways.routed(shape, weights, 0.0),
    }
    for s in SPARSITIES:
        out["routed", s] = ways.routed(shape, weights, s)
        for method in ("lte+teal", "lte+cuts"):
            cuts = CUTS[method]
            experts = expert_sparsity(3, s, cuts)
            out[WAYS[method], s] = ways.routed(shape, weights, experts, hidden=cuts.hidden, inputs=cuts.inputs)
        out["gate-first", s] = ways.gate_first(shape, weights, s)
        out["single neurons", s] = ways.routed(shape, weights, 0.0, hidden=s, inputs=s)
        out["predicted experts", s] = predicted(shape, weights, s, min(128, shape.d_model), neurons=False)
        out["predicted neurons", s] = predicted(shape, weights, s, min(96, shape.d_model // 4), neurons=True)
    return out


@torch.no_grad()
def main(
    d_model: Annotated[int, typer.Option(help="Width of the model.")] = 576,
    d_ff: Annotated[int, typer.Option(help="Neurons of the FFN.")] = 1536,
    group_size: Annotated[int, typer.Option(help="Neurons per expert.")] = 8,
    seconds: Annotated[float, typer.Option(help="Rough time of the turns.")] = 20.0,
    results: Annotated[Path, typer.Option(help="This CSV is written anew.")] = Path("frontier_time.csv"),
) -> None:
    shape = Shape(tokens=1, d_model=d_model, d_ff=d_ff, group_size=group_size)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for (way, sparsity), timing in interleaved(contenders(shape), seconds=seconds).items():
            row = {
                "way": way, "d_model": d_model, "d_ff": d_ff, "group_size": group_size, "dtype": "float32",
                "threads": torch.get_num_threads(), "sparsity": f"{sparsity:g}",
                "median_ms": f"{1e3 * timing.median:.4f}", "p20_ms": f"{1e3 * timing.p20:.4f}",
                "p80_ms": f"{1e3 * timing.p80:.4f}", "repeats": timing.repeats,
                "machine": machine(), "torch": torch.__version__,
            }  # fmt: skip
            writer.writerow(row)
            print(f"{way} {sparsity:.0%}: {row['median_ms']} ms")


if __name__ == "__main__":
    typer.run(main)
