"""What is kept of all that a pass sees: rows drawn at random, and counts."""

from __future__ import annotations

import torch
from torch import Tensor


class SomeRows:
    """Copies of at most `keep` rows of each tensor, drawn at random, the same for the same tensors; None keeps all.

    A stride would meet the length of the sequences and see some positions only.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(0)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.keep is None or len(rows) <= self.keep:
            return rows.clone()
        return rows[torch.randperm(len(rows), generator=self.generator)[: self.keep].to(rows.device)]


class Reservoir:
    """At most `keep` of all rows that were added, each as likely as any other, in their order.

    The same rows give the same sample, however they were divided into batches.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(0)
        self.parts: list[Tensor] = []
        self.keys = torch.empty(0, dtype=torch.float64)  # of the kept rows: those with the smallest are kept

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        if len(self.keys) == self.keep:
            hopeful = keys < self.keys.max()
            rows, keys = rows[hopeful.to(rows.device)], keys[hopeful]
        self.parts, self.keys = [*self.parts, rows.clone()], torch.cat([self.keys, keys])
        if len(self.keys) > self.keep:
            best = self.keys.topk(self.keep, largest=False, sorted=False).indices.sort().values
            self.parts, self.keys = [self.rows()[best.to(rows.device)]], self.keys[best]

    def rows(self) -> Tensor:
        """At least one tensor must have been added."""
        return torch.cat(self.parts)

    def __len__(self) -> int:
        return len(self.keys)


class Tally:
    """How many of the entries that were added are True: counts, so that a million tokens take no more than one."""

    def __init__(self) -> None:
        self.count, self.true = 0, 0

    def add(self, entries: Tensor) -> None:
        self.count += entries.numel()
        self.true = self.true + entries.sum()  # type: ignore[assignment]  # a tensor: no GPU is waited for

    def share(self) -> float:
        return int(self.true) / self.count
