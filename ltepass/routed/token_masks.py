"""Masks of tokens, True at what is no padding: read from any form of an attention mask, and fitted to a site's rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Part = Literal["whole", "encoder", "decoder"]  # of a model


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
