"""Which positions of a batch count in the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltepass.routed.token_masks import IGNORED


def shifts_labels(model: nn.Module) -> bool:
    """Whether a position predicts the next label, as in a decoder alone; an encoder-decoder's predicts its own."""
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def label_mask(labels: Tensor, *, shifted: bool = True) -> Tensor:
    """Which positions count in a causal loss: those whose next label is not -100.

    Arguments:
        labels: [B, T] int64.
        shifted: False where a position predicts its own label, as in an encoder-decoder.
    Returns: bool [B, T].
    Raises: nothing.
    Example:
        >>> ltepass.label_mask(torch.tensor([[5, 6, -100]]))
        tensor([[ True, False, False]])
    """
    if not shifted:
        return labels != IGNORED
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[..., :-1] = labels[..., 1:] != IGNORED
    return mask
