"""Soft, hard or dense: what the gates of a whole model do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ltepass.config import Mode, check_mode
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.token_masks import attach_token_hooks, detach_token_hooks
from ltepass.routed.undo import verb
from ltepass.threads import unshared


@verb
def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switch every router. Paper section 4.2.

    Arguments:
        model: a transformed model, not lowered.
        mode: "soft" and "hard" as the paper has them; "dense" leaves the gates open.
    Returns: None.
    Raises: ConfigError (no such mode), NotTransformedError, LoweredError.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> set(ltepass.report(model).modes.values())
        {'hard'}
    """
    check_mode(mode)
    routed = Routed.trained(model, "set_mode")
    switch(routed, mode)


def switch(routed: Routed, mode: Mode) -> None:
    """Every router to this mode."""
    for router in routed.all_routers():
        router.mode = mode
        router.recorder.calls.clear()
    if mode == "soft":
        attach_token_hooks(routed)  # what a forward leaves for the losses begins anew with the next
    else:
        detach_token_hooks(routed.model)
    remember_densities(routed)


@contextmanager
def mode_of(routed: Routed, mode: Mode) -> Iterator[None]:
    """Run a block in another mode. Forwards of other threads raise ConcurrencyError meanwhile."""
    before: list[tuple[Router, Mode]] = [(r, r.mode) for r in routed.all_routers()]
    with unshared(router for router, _ in before):
        for router, _ in before:
            router.mode = mode
        try:
            yield
        finally:
            for router, old in before:
                router.mode = old


def remember_densities(routed: Routed) -> None:
    """Tell the GPU kernels how many experts to expect, so that no call has to count: their path depends on it."""
    for router in routed.all_routers():
        router.note_density()
