"""Time of one optimizer step: dense fine-tuning, LTE's soft stage and its hard stage, interleaved, eager.

    python -m examples.compare.step_time --model smollm2 --tokens 1024 --results step_time.csv
    python -m examples.compare.step_time --group-size 32 --sparsity 0.8 --results step_time.csv
    python -m examples.compare.step_time --model smollm2 --tokens 8192 --micro-batches 4 --results step_time.csv
    python -m examples.compare.step_time --model smollm2 --tokens 1024,8192 --device cuda --results step_time.csv

Forward, backward with the auxiliary losses, clipping and AdamW, on one model: dense mode, soft mode, hard mode, and
hard mode through the sparse op and its backward (`LTESettings(through_op=True)`).
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import ltepass
from examples.compare import models
from examples.compare.frontier import machine
from examples.compare.frontier_rows import spread_of
from ltepass.training.auxiliary_loss import take_auxiliary
from ltepass.training.stages import begin_stage

FIELDS = (
    "model tokens micro_batches group_size sparsity side median_s low_s high_s ratio_to_dense repeats machine torch"
).split()
SIDES = ("dense", "soft", "hard", "hard through the op")


def step(model: Any, optimizer: torch.optim.Optimizer, parts: Sequence[Tensor], side: str) -> None:
    for ids in parts:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if side == "soft":
            aux = take_auxiliary(model, None)
            loss = loss + (0.3 * aux.efficiency + 0.5 * aux.separability) / aux.tokens
        (loss / len(parts)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds(model: Any, optimizer: torch.optim.Optimizer, parts: Sequence[Tensor], side: str) -> float:
    """Of one step; what a stage does once is not counted."""
    if side == "dense":
        ltepass.set_mode(model, "dense")
    else:
        begin_stage(model, "soft" if side == "soft" else "hard")
    if side == "hard through the op":
        ltepass.lower(model)
    if parts[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(model, optimizer, parts, side)
    if parts[0].is_cuda:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    ltepass.unlower(model)
    return taken


def measure(model: Any, parts: Sequence[Tensor], repeats: int, sides: Sequence[str] = SIDES) -> dict[str, list[float]]:
    """The sides take turns; the first round is not counted."""
    dense, lowered = (torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for _ in range(2))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        first = turn % len(sides)
        for side in (*sides[first:], *sides[:first]):
            # its state lies in memory as the lowered weights do
            optimizer = lowered if side == "hard through the op" else dense
            taken = seconds(model, optimizer, parts, side)
            if turn:
                times[side].append(taken)
    return times


def main(
    model: Annotated[str, typer.Option(help="smollm2, or a directory.")] = "smollm2",
    tokens: Annotated[str, typer.Option(help="Tokens of a step, comma-separated.")] = "1024",
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    group_size: Annotated[int, typer.Option(help="Neurons per expert.")] = 8,
    sparsity: Annotated[float, typer.Option(help="Of the hard stage.")] = 0.5,
    micro_batches: Annotated[int, typer.Option(help="Parts of a step, whose gradients add up.")] = 1,
    sides: Annotated[str, typer.Option(help="Stages measured beside dense, comma-separated.")] = ",".join(SIDES[1:]),
    repeats: Annotated[int, typer.Option(help="Counted rounds.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    results: Annotated[Path, typer.Option(help="Rows are added to this CSV.")] = Path("step_time.csv"),
) -> None:
    loaded = models.load(model, Path())
    some = torch.randint(0, loaded.config.vocab_size, (2, length))
    config = ltepass.LTEConfig(group_size=group_size, target_sparsity=sparsity, grouping="identity")
    ltepass.transform(loaded, config=config, calibration=[some])
    loaded.to(device).train()
    new = not results.exists()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for count in map(int, tokens.split(",")):
            ids = torch.randint(0, loaded.config.vocab_size, (count // length, length), device=device)
            times = measure(loaded, ids.chunk(micro_batches), repeats, ("dense", *sides.split(",")))
            for side, taken in times.items():
                # each round's ratio to its own dense step: a slow spell hits both
                ratios = [a / b for a, b in zip(taken, times["dense"], strict=True)]
                row = {
                    "model": model, "tokens": count, "micro_batches": micro_batches, "group_size": group_size,
                    "sparsity": sparsity, "side": side,
                    "median_s": f"{statistics.median(taken):.4f}",
                    "low_s": f"{min(taken):.4f}", "high_s": f"{max(taken):.4f}",
                    "ratio_to_dense": f"{statistics.median(ratios):.3f}", "repeats": repeats, "machine": machine(),
                    "torch": torch.__version__,
                }  # fmt: skip
                writer.writerow(row)
                print(f"{count} tokens, {side}: {statistics.median(taken):.3f} s, x{spread_of(ratios)} of dense")


if __name__ == "__main__":
    typer.run(main)
