"""How the op takes a site's neurons of a parameter: one rule each, for modules and for Dynamo's graphs."""

from __future__ import annotations

from torch import Tensor


def is_whole(step: int, length: int, d_ff: int) -> bool:
    """Whether a parameter of this length along its neurons is the operand as it stands."""
    return step == 1 and length == d_ff


def fits(view: Tensor) -> bool:
    """Whether the op takes this view of a parameter, else a copy of it: strided rows it does, and no strided bias."""
    return view.dim() != 1 or view.is_contiguous()
