"""The demo's two trainings, on the same batches in the same order; each can be interrupted and goes on later."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LEARNING_RATE = 1e-4
WARMUP = 0.06  # share of the steps, as in the paper


def batches(blocks: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches [batch, T] of blocks [n, T] in the seed's order; no block twice before all were used."""
    order = torch.cat(
        [torch.randperm(len(blocks), generator=_generator(seed + i)) for i in range(1 + steps * batch // len(blocks))]
    )
    for step in range(steps):
        yield blocks[order[step * batch : (step + 1) * batch]]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
