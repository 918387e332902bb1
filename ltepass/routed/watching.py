"""A pass in which every FFN site is watched, and the sample of activations that a dense one keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.config import Mode
from ltepass.routed.padding import telling_tokens, tokens_of
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, require_trained, router_of
from ltepass.sparsity.thresholds import mode_of, require_seen, run_batches
from ltepass.threads import require_own

BUDGET_BYTES = 900_000_000  # of sampled activations, all sites together
SAMPLE_TOKENS = 2048  # for grouping and tables; the routers' regression sees every token


@dataclass
class Sample:
    """What one site saw: x [n_tokens, d_model] and hidden units h [n_tokens, d_ff], both fp32 when read."""

    x: Tensor
    h: Tensor


def collect(model: nn.Module, batches: Iterable[Any]) -> dict[str, Sample]:
    """The first inputs and hidden units of every site, in dense mode: SAMPLE_TOKENS, or what BUDGET_BYTES holds."""
    state = require_trained(model, "collect")
    per_token = sum(2 * (s.d_model + s.d_ff) for s in state.sites)
    room = min(SAMPLE_TOKENS, max(256, BUDGET_BYTES // per_token))
    collectors = [_Collector(s, router_of(model, s), room) for s in state.sites]
    watch(model, takewhile(lambda _: not all(c.full for c in collectors), batches), collectors)
    return {c.site.name: Sample(torch.cat(c.x), torch.cat(c.h)) for c in collectors}


def watch(model: nn.Module, batches: Iterable[Any], observers: Sequence[Observer], *, mode: Mode = "dense") -> None:
    """A pass in which every observer sees its own site. Raises CalibrationError where one saw no token."""
    with mode_of(model, mode), telling_tokens(model):  # first: no other thread's forward is seen
        try:
            for observer in observers:
                observer.open()
            run_batches(model, batches)
        finally:
            for observer in observers:
                observer.close()
    require_seen({o.site.name: o.tokens for o in observers})


class Observer(ABC):
    """Sees the inputs x [n, d_model], then the hidden units h [n, d_ff], of every forward of one site: of tokens."""

    handle: Any = None

    def __init__(self, site: FFNSite, router: Router) -> None:
        self.site, self.router, self.tokens = site, router, 0

    @abstractmethod
    def on_input(self, x: Tensor) -> None: ...

    @abstractmethod
    def on_hidden(self, h: Tensor) -> None: ...

    def open(self) -> None:
        self.handle = self.router.register_forward_pre_hook(lambda _, args: self._count(args[0]))
        self.router.observer = lambda h: self.on_hidden(tokens_of(self.router, h))

    def _count(self, seen: Tensor) -> None:
        if self.router.thread is not None:  # before the router itself asks: what is seen here would be kept
            require_own(self.router.thread)
        x = tokens_of(self.router, seen)
        self.tokens += len(x)
        self.on_input(x)

    def close(self) -> None:
        if self.handle is not None:  # it was opened before the pass was interrupted
            self.handle.remove()
        self.router.observer = None


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

    @property
    def full(self) -> bool:
        return sum(len(r) for r in self.h) >= self.room
