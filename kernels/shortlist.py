"""`ltepass::linear_shortlist`: a linear of many outputs, of which only the largest matter: a head over a vocabulary.

All of them are computed from 4 bits, and those that are among the largest again from 8. Schema, check, fake, dispatch;
the definition is `linear_reference.linear_shortlist`. Importing this registers the op and builds nothing. For
inference: there is no gradient.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import linear, linear_reference
from ltepass.kernels.dispatch import any_device, vmap_over_x

NAME = "linear_shortlist"
_library = torch.library.Library("ltepass", "FRAGMENT")
_library.define(
    f"{NAME}(Tensor x, Tensor codes, Tensor scale, Tensor scan_codes, Tensor scan_scale, int rows, "
    "Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_op = torch.ops.ltepass.linear_shortlist.default


def check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    scan_codes: Tensor,
    scan_scale: Tensor,
    rows: int,
    bias: Tensor | None = None,
) -> None:
    """What no path can make sense of; the C++ kernel makes the same checks itself."""
    linear.check_int8(x, codes, scale, bias)
    linear.check_int4(x, scan_codes, scan_scale, None, bias)
    if len(codes) != len(scan_codes):
        raise LTEError(
            f"codes are {linear.words(codes)} and scan_codes {linear.words(scan_codes)}; expected equal rows"
        )
    if rows < 1:
        raise LTEError(f"rows is {rows}; expected at least 1")


def _definition(x: Tensor, *weights: Tensor) -> Tensor:
    check(x, *weights)  # type: ignore[arg-type]  # one of them is a number
    return linear_reference.linear_shortlist(x, *weights)  # type: ignore[arg-type]


def _fake(x: Tensor, codes: Tensor, *others: Tensor) -> Tensor:
    check(x, codes, *others)  # type: ignore[arg-type]
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_library.impl(NAME, any_device(_op, _definition), "CompositeExplicitAutograd")
torch.library.register_fake(f"ltepass::{NAME}", _fake, lib=_library)
torch.library.register_vmap(f"ltepass::{NAME}", vmap_over_x(_op), lib=_library)
