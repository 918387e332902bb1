"""Which of the rows that reach an FFN are tokens, and which are padding: one place for every statistic.

A hook on the module that is called notes the masks of the forward that really runs, whoever made its inputs (a batch,
a trainer that pads anew, an adapter that calls the base model):

    sites of        mask
    an encoder      attention_mask, of the tokens that this forward reads (the last columns of a longer mask)
    a decoder       decoder_attention_mask; without one, labels that are not ignored
    anything else   attention_mask

A site's rows are told by their shape. Rows that no mask fits all count, with a warning: those of audio at another rate.
So do, without one, the rows of images, and those of a model that takes its padding out by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ltepass.routed.token_masks import Forward, Part, TokenRows, fitted, token_mask

if TYPE_CHECKING:  # a router's recorder, below them, holds what is here
    from ltepass.routed.routed import Routed
    from ltepass.routed.router import Router
    from ltepass.routed.sites import FFNSite

IGNORED = -100  # what transformers puts where a position has no label
TOKENS = ("input_ids", "inputs_embeds")
DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


def tokens_of(router: Router, value: Tensor) -> Tensor:
    """value: [..., width] -> [n, width]: the rows that are tokens, without gradients."""
    known = router.recorder.rows
    mask = None if known is None else known.mask(value.shape[:-1])
    rows = value.detach()
    return rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask]


def sequences_of(router: Router, value: Tensor) -> tuple[Tensor, Tensor]:
    """value: [..., width], in any layout that a mask fits -> ([B, T, width], bool [B, T], True at tokens)."""
    shape = value.shape[:-1]
    known = router.recorder.rows
    real = None if known is None else known.mask(shape)
    if real is None or known is None:
        return value, torch.ones(shape, dtype=torch.bool, device=value.device)
    mask = next(m for m in known.forward.masks if fitted(m, tuple(shape)) is not None)
    if mask.numel() != real.numel():  # the model took its padding out by itself
        return value, real
    turned = value.transpose(0, 1) if shape == mask.shape[::-1] != mask.shape else value
    return turned.reshape(*mask.shape, -1), mask


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
        for module in _callable_parts(routed.model):
            enter = _Enter(self, routed.model, module)
            self.handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            self.handles.append(module.register_forward_hook(_Leave(enter), always_call=True))

    def remove(self) -> None:
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
        parts = _encoder_and_decoder(model)
        self.both = bool(parts) and module not in parts.values()
        below = set(module.modules())
        for site, router in zip(hooks.sites, hooks.routers, strict=True):
            if router in below:
                part: Part = next((name for name, part in parts.items() if router in part.modules()), "whole")
                self.sites.append((site, router, part, _reads_tokens(model, site)))

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self.hooks.running or self.of_another_thread():
            return
        self.hooks.running = self.running = True
        self.hooks.number += 1
        masks = self._masks(dict(zip(self.names, args, strict=False)) | kwargs)
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

    def _masks(self, given: Mapping[str, object]) -> dict[Part, tuple[Tensor, ...]]:
        own = token_mask(given.get("attention_mask"), _length(given, TOKENS))
        if not self.both:
            return dict.fromkeys(("whole", "encoder", "decoder"), own)
        length = _length(given, DECODER_TOKENS)
        decoder = token_mask(given.get("decoder_attention_mask"), length)
        labels = given.get("labels")
        if not decoder and isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == length:
            decoder = (labels != IGNORED,)
        return {"encoder": own, "decoder": decoder, "whole": (*own, *decoder)}


class _Leave:
    def __init__(self, enter: _Enter) -> None:
        self.enter = enter

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if self.enter.running and not self.enter.of_another_thread():
            self.enter.hooks.running = self.enter.running = False


def _callable_parts(model: nn.Module) -> list[nn.Module]:
    parts = (model, getattr(model, "base_model", None), _part(model, "encoder"), _part(model, "decoder"))
    return list(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))


def _encoder_and_decoder(model: nn.Module) -> dict[Part, nn.Module]:
    """Both, of a model whose decoder reads other tokens than its encoder; else nothing."""
    encoder, decoder = _part(model, "encoder"), _part(model, "decoder")
    if encoder is None or decoder is None or not set(DECODER_TOKENS[:2]) & set(signature(model.forward).parameters):
        return {}
    if encoder in decoder.modules() or decoder in encoder.modules():
        return {}  # BLIP-2 calls a whole language model its encoder
    return {"encoder": encoder, "decoder": decoder}


def _part(module: nn.Module, name: str) -> nn.Module | None:
    """A model's encoder or decoder, the innermost that it names so; None where that is the model itself."""
    found = module
    while True:
        get = getattr(found, f"get_{name}", None)
        inner = get() if callable(get) else getattr(found, name, None)
        if inner is found or not isinstance(inner, nn.Module):
            return None if found is module else found
        found = inner


def _reads_tokens(model: nn.Module, site: FFNSite) -> bool:
    """Not in the tower of a model of text and images that sees the images."""
    path, named = site.router.split("."), [getattr(model, "main_input_name", "input_ids")]
    for depth in range(1, len(path)):
        named.append(getattr(model.get_submodule(".".join(path[:depth])), "main_input_name", named[-1]))
    return named[-1] in ("input_ids", named[0]) and not named[-1].startswith("pixel_values")


def _length(given: Mapping[str, object], names: Sequence[str]) -> int | None:
    """T of the first of these inputs that is there."""
    return next((v.shape[1] for n in names if isinstance(v := given.get(n), Tensor) and v.dim() > 1), None)
