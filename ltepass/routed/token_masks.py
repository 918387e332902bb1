"""Which of the rows that reach an FFN are tokens, and which are padding: one place for every statistic.

Masks of tokens, True at what is no padding, are read from any form of an attention mask:

    sites of        mask
    an encoder      attention_mask, of the tokens that this forward reads (the last columns of a longer mask)
    a decoder       decoder_attention_mask; without one, labels that are not ignored
    anything else   attention_mask

A site's rows are told by their shape. Rows that no mask fits all count, with a warning: those of audio at another rate.
So do, without one, the rows of images, and those of a model that takes its padding out by itself.

Hooks (`TokenHooks`) note the masks of the forward that really runs, whoever made its inputs: a batch, a trainer that
pads anew, an adapter that calls the base model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ltepass.routed.batches import DECODER_INPUTS, Part, callable_parts, encoder_and_decoder

if TYPE_CHECKING:  # a router's recorder, below it, holds what is here
    from ltepass.routed.routed import Routed
    from ltepass.routed.router import Router
    from ltepass.routed.sites import FFNSite


IGNORED = -100  # what transformers puts where a position has no label
TOKENS = ("input_ids", "inputs_embeds")
DECODER_TOKENS = (*DECODER_INPUTS, "labels")


class Forward(NamedTuple):
    """One forward, as a site's part of the model sees it. masks: bool [B, T] each, True at tokens; none: all rows are.

    number: counts forwards, so that calls of one FFN in the same forward can be told from calls in several.
    """

    masks: tuple[Tensor, ...] = ()
    part: Part = "whole"
    number: int = 0

    def tokens(self, shape: Sequence[int]) -> Tensor | None:
        """bool of this shape; None where no mask fits rows of it, or several do."""
        fits = [fit for mask in self.masks if (fit := fitted(mask, tuple(shape))) is not None]
        return fits[0] if len(fits) == 1 else None

    def after_tokens(self, shape: Sequence[int]) -> Tensor | None:
        """bool of this shape, True at rows that come after a token in their sequence; None where that is not known."""
        before = tuple(nn.functional.pad(mask, (1, -1)) for mask in self.masks)
        return self._replace(masks=before).tokens(shape)


def fitted(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A mask [B, T] for rows [B, T], [T, B] or [B * T], or for the tokens alone."""
    if _longer(shape) == _longer(mask.shape) or (len(_longer(shape)) < 2 and math.prod(shape) == mask.numel()):
        return mask.reshape(shape)
    if shape == (mask.shape[1], mask.shape[0]):
        return mask.T
    return mask.new_ones(shape) if math.prod(shape) == int(mask.sum()) else None


def _longer(shape: Sequence[int]) -> list[int]:
    """Without the dims that only hold a place."""
    return [size for size in shape if size != 1]


class TokenRows:
    """With a site's recorder while somebody counts: what the present forward says of the rows that it sees."""

    def __init__(self, name: str) -> None:
        self.name, self.forward, self.warned = name, Forward(), False

    def mask(self, shape: Sequence[int], forward: Forward | None = None) -> Tensor | None:
        """bool of this shape, True at tokens; None where every row counts. forward: another than the present one."""
        forward = forward or self.forward
        found = forward.tokens(shape)
        if found is None and not self.warned and any(not bool(mask.all()) for mask in forward.masks):
            self.warned = True
            seen = " and ".join(str(list(mask.shape)) for mask in forward.masks)
            warnings.warn(
                f"{self.name} saw rows of shape {list(shape)} and the mask of the batch is {seen}: which of them are "
                "padding is not known, so all count",
                stacklevel=2,
            )
        return found


def token_mask(mask: object, length: int | None) -> tuple[Tensor, ...]:
    """bool [B, T], True at tokens, from any form of an attention mask that tells them; nothing where none does.

    mask: [B, S] or, as attention takes it, [B, 1, Q, S]; bool, numbers that are 0 at padding, or numbers to add that
    are 0 at tokens; one of several kinds of layers in a dict. A token sees itself, and padding is seen by nobody.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        return ()
    real = mask > 0
    if mask.is_floating_point():
        real = torch.where((mask < 0).any(), mask >= 0, real)
        real = real | ~real.any()  # zeros to add: nothing is padding
    if real.dim() > 2:
        real = real.flatten(1, -3)[:, 0] if real.dim() > 3 else real
        queries = real.shape[1]
        real = real[:, 0] if queries == 1 else real[:, :, -queries:].diagonal(dim1=1, dim2=2)
        real = real | ~real.any()  # no token sees itself: this mask tells something else
    return (real if length is None else real[:, -length:],)


def masks_of(given: Mapping[str, object], *, decoder: bool) -> dict[Part, tuple[Tensor, ...]]:
    """Masks of the tokens in a call's inputs, by part of the model. decoder: they are an encoder's and a decoder's."""
    own = token_mask(given.get("attention_mask"), _length(given, TOKENS))
    if not decoder:
        return dict.fromkeys(("whole", "encoder", "decoder"), own)
    length = _length(given, DECODER_TOKENS)
    theirs = token_mask(given.get("decoder_attention_mask"), length)
    labels = given.get("labels")
    if not theirs and isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == length:
        theirs = (labels != IGNORED,)
    return {"encoder": own, "decoder": theirs, "whole": (*own, *theirs)}


def _length(given: Mapping[str, object], names: Sequence[str]) -> int | None:
    """T of the first of these inputs that is there."""
    return next((v.shape[1] for n in names if isinstance(v := given.get(n), Tensor) and v.dim() > 1), None)


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


def reads_tokens(model: nn.Module, site: FFNSite) -> bool:
    """Whether a site's rows are tokens: not in the tower of a model of text and images that sees the images."""
    path, named = site.router.split("."), [getattr(model, "main_input_name", "input_ids")]
    for depth in range(1, len(path)):
        named.append(getattr(model.get_submodule(".".join(path[:depth])), "main_input_name", named[-1]))
    return named[-1] in ("input_ids", named[0]) and not named[-1].startswith("pixel_values")


@contextmanager
def telling_tokens(routed: Routed, *, keep: bool = False) -> Iterator[TokenHooks]:
    """While the block runs, every router knows which of its rows are tokens.

    keep: what routers record for the losses stays from one forward to the next, until it is taken; otherwise a forward
    begins anew.
    """
    hooks, before = attach_token_hooks(routed)
    kept, hooks.keep = hooks.keep, keep
    try:
        yield hooks
    finally:
        hooks.keep = kept
        if not before:
            detach_token_hooks(routed.model)


def attach_token_hooks(routed: Routed) -> tuple[TokenHooks, bool]:
    """The model's hooks, and whether it had them before."""
    present = hooks_of(routed.model)
    return (TokenHooks(routed), False) if present is None else (present, True)


def detach_token_hooks(model: nn.Module) -> None:
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
