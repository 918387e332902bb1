"""Hooks that note the masks of the forward that really runs, whoever made its inputs: a batch, a trainer that pads
anew, an adapter that calls the base model. Every router then knows which of its rows are tokens (token_masks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.hooks import RemovableHandle

from ltepass.routed.model_parts import Part, callable_parts, encoder_and_decoder
from ltepass.routed.token_masks import Forward, TokenRows, masks_of, reads_tokens

if TYPE_CHECKING:  # a router's recorder, below them, holds what is here
    from ltepass.routed.routed import Routed
    from ltepass.routed.router import Router
    from ltepass.routed.sites import FFNSite


@contextmanager
def telling_tokens(routed: Routed, *, keep: bool = False) -> Iterator[TokenHooks]:
    """While the block runs, every router knows which of its rows are tokens.

    keep: what routers record for the losses stays from one forward to the next, until it is taken; otherwise a forward
    begins anew.
    """
    hooks, before = attach(routed)
    kept, hooks.keep = hooks.keep, keep
    try:
        yield hooks
    finally:
        hooks.keep = kept
        if not before:
            detach(routed.model)


def attach(routed: Routed) -> tuple[TokenHooks, bool]:
    """The model's hooks, and whether it had them before."""
    present = hooks_of(routed.model)
    return (TokenHooks(routed), False) if present is None else (present, True)


def detach(model: nn.Module) -> None:
    present = hooks_of(model)
    if present is not None:
        present.remove()


def hooks_of(model: nn.Module) -> TokenHooks | None:
    return next((h.hooks for h in model._forward_pre_hooks.values() if isinstance(h, _Enter)), None)


class TokenHooks:
    """On the model and on what others may call in its place (a base model, an encoder or decoder by itself)."""

    def __init__(self, routed: Routed) -> None:
        self.keep, self.number, self.running = False, 0, False
        self.output = Forward()  # of the last forward, as the model's output sees it
        self.handles: list[RemovableHandle] = []
        self.sites, self.routers = routed.sites, routed.routers
        for site, router in routed:
            router.recorder.rows = TokenRows(site.name)
        for module in callable_parts(routed.model):
            enter = _Enter(self, routed.model, module)
            self.handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            self.handles.append(module.register_forward_hook(_Leave(enter), always_call=True))

    def remove(self) -> None:
        """Take the hooks away; routers no longer know which of their rows are tokens."""
        for handle in self.handles:
            handle.remove()
        for router in self.routers:
            router.recorder.rows = None


class _Enter:
    """Before one module's forward: notes what it is given, unless it is called by another that noted already."""

    def __init__(self, hooks: TokenHooks, model: nn.Module, module: nn.Module) -> None:
        self.hooks, self.running = hooks, False
        self.names = list(signature(module.forward).parameters)
        self.sites: list[tuple[FFNSite, Router, Part, bool]] = []
        parts = encoder_and_decoder(model)
        self.both = bool(parts) and module not in parts.values()
        below = set(module.modules())
        for site, router in zip(hooks.sites, hooks.routers, strict=True):
            if router in below:
                part: Part = next((name for name, part in parts.items() if router in part.modules()), "whole")
                self.sites.append((site, router, part, reads_tokens(model, site)))

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """The hook: every router below is told the masks of the forward that begins."""
        if self.hooks.running or self.of_another_thread():
            return
        self.hooks.running = self.running = True
        self.hooks.number += 1
        masks = masks_of(dict(zip(self.names, args, strict=False)) | kwargs, decoder=self.both)
        for site, router, part, told in self.sites:
            recorder = router.recorder
            if recorder.rows is None:
                recorder.rows = TokenRows(site.name)  # of a copied model: its routers are copied without
            recorder.rows.forward = Forward(masks[part] if told else (), part, self.hooks.number)
            if not self.hooks.keep:
                recorder.calls.clear()
        self.hooks.output = Forward(masks["decoder" if self.both else "whole"], number=self.hooks.number)

    def of_another_thread(self) -> bool:
        """Whether a call has the model to itself, and this forward, which its first router refuses, is none of it."""
        return any(router.thread not in (None, get_ident()) for _, router, _, _ in self.sites[:1])


class _Leave:
    def __init__(self, enter: _Enter) -> None:
        self.enter = enter

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.enter.running and not self.enter.of_another_thread():
            self.enter.hooks.running = self.enter.running = False
