"""The logits of all routers while a block of code runs: all of them, or of rows drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ltepass.routed import token_masks
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite
from ltepass.routed.watching import on_logits


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


@contextmanager
def record_logits(routed: Routed, keep: int | None = None, *, flat: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect every router's logits [n_tokens, n_experts] by site name while the block runs, without those of padding.

    keep: at most so many tokens per forward; None keeps all. flat: False leaves the shape as it is, padding included.
    """
    seen: dict[str, list[Tensor]] = {site.name: [] for site in routed.sites}
    draws = {name: SomeRows(keep) for name in seen}

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        rows = draws[site.name](token_masks.tokens_of(router, logits)) if flat else logits.clone()
        seen[site.name].append(rows)

    with on_logits(routed, see):
        yield seen
