"""A pass in which every FFN site is watched: observers, and hooks on its routers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ltepass.config import Mode
from ltepass.errors import CalibrationError
from ltepass.routed.batches import Batch, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
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
        require_own(self.router)  # before the router itself does: what is seen here would be kept
        x = tokens_of(self.router, seen)
        self.tokens += len(x)
        self.on_input(x)

    def close(self) -> None:
        if self.handle is not None:  # it was opened before the pass was interrupted
            self.handle.remove()
        self.router.observer = None


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


def require_seen(counts: dict[str, int]) -> None:
    """counts: by site name, of tokens or batches that it saw. Raises CalibrationError where that is none."""
    missed = [name for name, count in counts.items() if not count]
    if missed:
        raise CalibrationError(
            f"no token reached {missed[0]} ({len(missed)} of {len(counts)} sites); expected at least one "
            "batch that runs through every FFN; pass batches of token ids"
        )


def require_finite(name: str, *made: Tensor) -> None:
    """made: of what the FFN of this name saw. Raises CalibrationError where that held NaN or infinite values."""
    if not all(bool(tensor.isfinite().all()) for tensor in made):
        raise not_finite(name)


def not_finite(name: str) -> CalibrationError:
    """Of an FFN by its name."""
    return CalibrationError(
        f"{name} saw values that are not finite; expected finite weights and hidden states on every batch; load "
        "the model in bfloat16 or float32, or leave out the batch that overflows"
    )
