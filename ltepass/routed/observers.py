"""A pass in which every FFN site is watched: observers, hooks on its routers, and the logits that they decide by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ltepass.config import Mode
from ltepass.routed import token_masks
from ltepass.routed.batches import Batch, require_seen, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import SomeRows
from ltepass.routed.sites import FFNSite
from ltepass.routed.token_masks import telling_tokens, tokens_of
from ltepass.threads import require_own, unshared


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


@contextmanager
def on_logits(routed: Routed, see: Callable[[FFNSite, Router, Tensor], None]) -> Iterator[None]:
    """While the block runs, calls see(site, router, logits [..., n_experts]) after every router, without gradients."""

    def hook(site: FFNSite) -> Callable[[Router, object, Tensor | None], None]:
        def run(router: Router, args: object, logits: Tensor | None) -> None:
            if logits is not None:
                see(site, router, logits.detach())

        return run

    handles = [router.register_forward_hook(hook(site)) for site, router in routed]
    try:
        with telling_tokens(routed), unshared(routed.all_routers()):
            yield
    finally:
        for handle in handles:
            handle.remove()
