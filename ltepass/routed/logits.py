"""The logits of all routers while a block of code runs: all of them, or of rows drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from ltepass.routed import token_masks
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import SomeRows
from ltepass.routed.sites import FFNSite
from ltepass.routed.token_hooks import telling_tokens
from ltepass.threads import unshared


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
