"""What the sparse op means with weights in int8 and a scale an output (`weight_formats.py`), in plain PyTorch.

Gate and up are `linear_int8`, x in int8 too; hidden units stay in fp32, and so do their products with the codes of
down, whose scale comes last. Proxies decide as they do with floats. A linear router is int8 too, and so is the token
that it reads, with one scale, so that its sums are integers and every path decides by the same bits:

    x       codes c_i and scale s as a proxy has them (`proxy_reference.py`)
    logit   (float(sum_i code_ei c_i) * scale_e) * s, then + bias_e where there is one; fp32, each step rounded
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.linear_reference import linear_int8
from ltepass.kernels.proxy_reference import quantise_token
from ltepass.kernels.reference import masked_units

MOST_INPUTS = (2**31 - 1) // 127**2  # of a router, whose sums fit in 32 bits


class Int8Linear(NamedTuple):
    """codes: int8 [d_out, d_in] as `nn.Linear` has them; scale: fp32 [d_out]; bias: [d_out] or None."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def scores(x: Tensor, router: Int8Linear) -> Tensor:
    """x: [..., d_model] any float dtype -> logits [..., n_experts] fp32; an expert is active above the threshold."""
    codes, scale = quantise_token(x)
    sums = F.linear(codes.double(), router.codes.double()).float()
    logits = sums * router.scale
    logits = logits * scale[..., None]
    return logits if router.bias is None else logits + router.bias


def masked_ffn(
    x: Tensor,
    active: Tensor,
    up: Int8Linear,
    gate: Int8Linear | None,
    down: Int8Linear,
    activation: str,
    cut: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """x: [..., d_model] -> [..., d_out] in x.dtype, the decision given as in `reference.masked_ffn`; sums in `wide`
    (fp64: the judge, returned as it is).
    """
    gated = None if gate is None else linear_int8(x.float(), *gate, wide=wide)
    h = masked_units(linear_int8(x.float(), *up, wide=wide), gated, active, activation, cut)
    y = F.linear(h, down.codes.to(wide)) * down.scale.to(wide)
    y = y if down.bias is None else y + down.bias.to(wide)
    return y if wide == torch.float64 else y.to(x.dtype)
