"""What the sparse op means with weights in int8 and a scale an output (`weight_formats.py`), in plain PyTorch.

Gate and up are `linear_int8`, x in int8 too; hidden units stay in fp32, and so do their products with the codes of
down, whose scale comes last. Routers and proxies decide as they do with floats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.linear_reference import linear_int8
from ltepass.kernels.reference import ACTIVATIONS, leave_out_small


def masked_ffn(
    x: Tensor,
    active: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    up_scale: Tensor,
    gate_scale: Tensor | None,
    down_scale: Tensor,
    activation: str,
    cut: Tensor | None = None,
    *,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """x: [..., d_model] -> [..., d_out] in x.dtype, the decision given as in `reference.masked_ffn`; up, gate and down:
    int8 as `nn.Linear` has them, scales fp32 [d_ff] and [d_out]; sums in `wide` (fp64: the judge, returned as it is).
    """
    act = ACTIVATIONS[activation]

    def project(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return linear_int8(x.float(), codes, scale, bias, wide=wide)

    h = project(up, up_scale, up_bias)
    h = act(h) if gate is None or gate_scale is None else act(project(gate, gate_scale, gate_bias)) * h
    h = h * active.to(wide).repeat_interleave(h.shape[-1] // active.shape[-1], -1)
    y = F.linear(leave_out_small(h, cut), down.to(wide)) * down_scale.to(wide)
    y = y if down_bias is None else y + down_bias.to(wide)
    return y if wide == torch.float64 else y.to(x.dtype)
