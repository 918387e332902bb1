"""What the sparse op means, in plain PyTorch: every kernel is judged by these lines.

Paper section 4.2, hard mode: y = sum over experts e with logit_e > threshold of E_e(x), unscaled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}


def mask(x: Tensor, router_weight: Tensor, router_bias: Tensor | None, threshold: Tensor) -> Tensor:
    """x: [..., d_model]; router_weight: [n_experts, d_model] fp32 -> bool [..., n_experts], decided in fp32.

    float64 inputs are decided in float64, for tests that need a sharper judge.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if router_bias is None else router_bias.to(wide)
    return F.linear(x.to(wide), router_weight.to(wide), bias) > threshold


def is_small(h: Tensor, cut: Tensor) -> Tensor:
    """bool, of h's shape: |h| <= cut, in fp32 or wider. NaN is not small, so that a fault stays visible."""
    return h.abs().to(torch.promote_types(h.dtype, torch.float32)) <= cut


def leave_out_small(h: Tensor, cut: Tensor | None) -> Tensor:
    """h, or x, with 0 for the entries up to the cut; no gradient flows to them."""
    return h if cut is None else h.masked_fill(is_small(h, cut), 0.0)


def masked_ffn(
    x: Tensor,
    active: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    cut: Tensor | None = None,
) -> Tensor:
    """The FFN with a given decision: active is bool [..., n_experts], expert e being neurons [e*g, (e+1)*g)."""
    gated = None if gate is None else F.linear(x, gate, gate_bias)
    return F.linear(masked_units(F.linear(x, up, up_bias), gated, active, activation, cut), down, down_bias)


def masked_units(up: Tensor, gate: Tensor | None, active: Tensor, activation: str, cut: Tensor | None) -> Tensor:
    """up, gate: [..., d_ff], what the linears give -> hidden units [..., d_ff], 0 where they are inactive or cut."""
    act = ACTIVATIONS[activation]
    h = act(up) if gate is None else act(gate) * up
    group_size = h.shape[-1] // active.shape[-1]
    h = h * active.to(h.dtype).repeat_interleave(group_size, -1)
    return leave_out_small(h, cut)


def routed_ffn(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    threshold: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    activation: str,
    cut: Tensor | None = None,
    input_cut: Tensor | None = None,
) -> Tensor:
    """x: [..., d_model] -> [..., d_out] in x.dtype. The definition of `ltepass::routed_ffn`: dense, then masked.

    cut: [] fp32 or None (the paper): hidden units of a size up to it are left out of the down projection too.
    input_cut: [] fp32 or None (the paper): so are entries of x of up and gate; the router sees them.
    """
    active = mask(x, router_weight, router_bias, threshold)
    seen = leave_out_small(x, input_cut)
    return masked_ffn(seen, active, up, up_bias, gate, gate_bias, down, down_bias, activation, cut)
