"""A pass in which every FFN site is watched: observers, and hooks on its routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ltepass.config import Mode
from ltepass.routed.batches import Batch, require_seen, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite
from ltepass.routed.token_masks import telling_tokens, tokens_of
from ltepass.threads import require_own


def watch(routed: Routed, batches: Iterable[Batch], observers: Sequence[Observer], *, mode: Mode = "dense") -> None:
    """A pass in which every observer sees its own site. Raises CalibrationError where one saw no token."""
    with mode_of(routed, mode), telling_tokens(routed):  # first: no other thread's forward is seen
        try:
            for observer in observers:
                observer.open()
            run_batches(routed.model, batches)
        finally:
            for observer in observers:
                observer.close()
    require_seen({o.site.name: o.tokens for o in observers})


class Observer(ABC):
    """Sees the inputs x [n, d_model], then the hidden units h [n, d_ff], of every forward of one site: of tokens."""

    handle: RemovableHandle | None = None

    def __init__(self, site: FFNSite, router: Router) -> None:
        self.site, self.router, self.tokens = site, router, 0

    @abstractmethod
    def on_input(self, x: Tensor) -> None: ...

    def on_hidden(self, h: Tensor) -> None:  # noqa: B027 -- some look at inputs alone
        pass

    def open(self) -> None:
        self.handle = self.router.register_forward_pre_hook(lambda _, args: self._count(args[0]))
        self.router.observer = lambda h: self.on_hidden(tokens_of(self.router, h))

    def _count(self, seen: Tensor) -> None:
        """Before the router: its input is looked at, and its tokens are counted."""
        if self.router.thread is not None:  # before the router itself asks: what is seen here would be kept
            require_own(self.router.thread)
        x = tokens_of(self.router, seen)
        self.tokens += len(x)
        self.on_input(x)

    def close(self) -> None:
        if self.handle is not None:  # it was opened before the pass was interrupted
            self.handle.remove()
        self.router.observer = None
