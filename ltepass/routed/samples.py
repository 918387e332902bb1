"""What is kept of all that a pass sees: a site's activations, routers' logits, rows drawn at random, and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import torch
from torch import Tensor

from ltepass.routed.batches import Batch
from ltepass.routed.observers import Observer, on_logits, require_finite, watch
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite
from ltepass.routed.token_masks import tokens_of


class Reservoir:
    """At most `keep` of all rows that were added, each as likely as any other, in their order.

    The same rows give the same sample, however they were divided into batches.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(0)
        self.parts: list[Tensor] = []
        self.keys = torch.empty(
            0, dtype=torch.float64, device="cpu"
        )  # of the kept rows: those with the smallest are kept

    def add(self, rows: Tensor) -> None:
        """Rows [n, ...]: each is kept with the same chance as all that came before."""
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64, device="cpu")
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


class SomeRows:
    """Copies of at most `keep` rows of each tensor, drawn at random, the same for the same tensors; None keeps all.

    A stride would meet the length of the sequences and see some positions only.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(0)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.keep is None or len(rows) <= self.keep:
            return rows.clone()
        return rows[torch.randperm(len(rows), generator=self.generator, device="cpu")[: self.keep].to(rows.device)]


class Tally:
    """How many of the entries that were added are True: counts, so that a million tokens take no more than one."""

    def __init__(self) -> None:
        self.count, self.true = 0, 0

    def add(self, entries: Tensor) -> None:
        self.count += entries.numel()
        self.true = self.true + entries.sum()  # type: ignore[assignment]  # a tensor: no GPU is waited for

    def share(self) -> float:
        return int(self.true) / self.count


T = TypeVar("T")
BUDGET_BYTES = 600_000_000  # of sampled activations, all sites together; of sums, of those that a pass sees


SAMPLE_TOKENS = 2048  # for grouping and tables; the routers' regression sees every token


def turns(sites: Sequence[T], most: int, size: Callable[[T], int]) -> Iterator[Sequence[T]]:
    """`most` of them at a time, or fewer where BUDGET_BYTES does not hold as many; one at least. size: bytes of one."""
    while sites:
        room, n = BUDGET_BYTES, 0
        while n < min(most, len(sites)) and (n == 0 or room >= size(sites[n])):
            room -= size(sites[n])
            n += 1
        yield sites[:n]
        sites = sites[n:]


@dataclass
class Sample:
    """What one site saw: x [n_tokens, d_model] and hidden units h [n_tokens, d_ff], both fp32 when read."""

    x: Tensor
    h: Tensor


def collect(routed: Routed, batches: Iterable[Batch]) -> dict[str, Sample]:
    """The first inputs and hidden units of every site, in dense mode: SAMPLE_TOKENS, or what BUDGET_BYTES holds."""
    per_token = sum(2 * (s.d_model + s.d_ff) for s in routed.sites)
    room = min(SAMPLE_TOKENS, max(256, BUDGET_BYTES // per_token))
    collectors = [_Collector(site, router, room) for site, router in routed]
    watch(routed, takewhile(lambda _: not all(c.full for c in collectors), batches), collectors)
    samples = {c.site.name: c.sample() for c in collectors}
    for name, sample in samples.items():
        require_finite(name, sample.x, sample.h)
    return samples


class _Collector(Observer):
    """Keeps bfloat16 copies of what one site sees, up to `room` tokens."""

    def __init__(self, site: FFNSite, router: Router, room: int) -> None:
        super().__init__(site, router)
        self.room = room
        self.x: list[Tensor] = []
        self.h: list[Tensor] = []

    def on_input(self, x: Tensor) -> None:
        self._keep(self.x, x)

    def on_hidden(self, h: Tensor) -> None:
        self._keep(self.h, h)

    def _keep(self, rows: list[Tensor], value: Tensor) -> None:
        left = self.room - sum(len(r) for r in rows)
        if left > 0:
            rows.append(value[:left].to(torch.bfloat16, copy=True))

    def sample(self) -> Sample:
        """Its own parts go: of all sites they would be as much again."""
        sample = Sample(torch.cat(self.x), torch.cat(self.h))
        self.x, self.h = [], []
        return sample

    @property
    def full(self) -> bool:
        return sum(len(r) for r in self.h) >= self.room


@contextmanager
def record_logits(routed: Routed, keep: int | None = None, *, flat: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect every router's logits [n_tokens, n_experts] by site name while the block runs, without those of padding.

    keep: at most so many tokens per forward; None keeps all. flat: False leaves the shape as it is, padding included.
    """
    seen: dict[str, list[Tensor]] = {site.name: [] for site in routed.sites}
    draws = {name: SomeRows(keep) for name in seen}

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        rows = draws[site.name](tokens_of(router, logits)) if flat else logits.clone()
        seen[site.name].append(rows)

    with on_logits(routed, see):
        yield seen
