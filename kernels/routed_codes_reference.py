"""What the sparse op means with weights in codes (`weight_formats.py`), in plain PyTorch.

Gate and up are `linear_int8` or `linear_int4`, x in int8 too. In int8 down is `linear_int8` as well, of all hidden
units, zeros where neurons are inactive: with every expert active the op is the dense FFN in int8. In 4 bits hidden
units stay in fp32, and down lies a neuron a row, in blocks of 32 outputs, so that an active neuron is found whole:
W_down = dequantise_int4(codes, scale)^T. Proxies decide as they do with floats. A linear router is int8 in both, and so
is the token that it reads, with one scale, so that its sums are integers and every path decides by the same bits:

    x       codes c_i and scale s as a proxy has them (`proxy_reference.py`)
    logit   (float(sum_i code_ei c_i) * scale_e) * s, then + bias_e where there is one; fp32, each step rounded
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.linear_reference import linear_int4, linear_int8
from ltepass.kernels.proxy_reference import quantise_token
from ltepass.kernels.reference import masked_units
from ltepass.kernels.weight_formats import dequantise_int4

MOST_INPUTS = (2**31 - 1) // 127**2  # of a router, whose sums fit in 32 bits


class CodedLinear(NamedTuple):
    """codes: int8 [d_out, d_in] as `nn.Linear` has them; scale: fp32 [d_out]; bias: [d_out] or None.

    In 4 bits: codes uint8 [d_out, d_in / 2], scale fp16 [d_out, d_in / 32]; of down [d_ff, d_out / 2] and
    [d_ff, d_out / 32].
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


def scores(x: Tensor, router: CodedLinear) -> Tensor:
    """x: [..., d_model] any float dtype -> logits [..., n_experts] fp32; an expert is active above the threshold."""
    codes, scale = quantise_token(x)
    sums = F.linear(codes.double(), router.codes.double()).float()
    logits = sums * router.scale
    logits = logits * scale[..., None]
    return logits if router.bias is None else logits + router.bias


def masked_ffn(
    x: Tensor,
    active: Tensor,
    up: CodedLinear,
    gate: CodedLinear | None,
    down: CodedLinear,
    activation: str,
    cut: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """x: [..., d_model] -> [..., d_out] in x.dtype, the decision given as in `reference.masked_ffn`; sums in `wide`
    (fp64: the judge, returned as it is).
    """
    h = hidden_units(x, active, up, gate, activation, cut, wide=wide)
    y = (_down_int4 if down.codes.dtype == torch.uint8 else _down_int8)(h, down, wide)
    return y if wide == torch.float64 else y.to(x.dtype)


def hidden_units(
    x: Tensor,
    active: Tensor,
    up: CodedLinear,
    gate: CodedLinear | None,
    activation: str,
    cut: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """x: [..., d_model] -> [..., d_ff] in `wide`, 0 where neurons are inactive or cut."""
    project = _project_int4 if up.codes.dtype == torch.uint8 else _project_int8
    gated = None if gate is None else project(x.float(), gate, wide)
    return masked_units(project(x.float(), up, wide), gated, active, activation, cut)


def _project_int8(x: Tensor, linear: CodedLinear, wide: torch.dtype) -> Tensor:
    return linear_int8(x, *linear, wide=wide)


def _project_int4(x: Tensor, linear: CodedLinear, wide: torch.dtype) -> Tensor:
    codes, scale, bias = linear
    return linear_int4(x, codes, scale, None, bias, wide=wide)


def _down_int8(h: Tensor, down: CodedLinear, wide: torch.dtype) -> Tensor:
    return linear_int8(h, down.codes, down.scale, None if down.bias is None else down.bias.to(h.dtype), wide=wide)


def _down_int4(h: Tensor, down: CodedLinear, wide: torch.dtype) -> Tensor:
    y = h @ dequantise_int4(down.codes, down.scale, None).to(wide)
    return y if down.bias is None else y + down.bias.to(wide)
