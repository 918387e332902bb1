"""Backward of the hard mode with a frozen router: plain PyTorch, so that it traces, compiles and differentiates again.

The decision is a constant here, so an expert that no token chose gets a zero gradient and costs what the mask costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ltepass.kernels.reference import ACTIVATIONS


def _quick_gelu_grad(x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


# Each takes (upstream gradient, pre-activation), as ATen's own *_backward do.
ACTIVATION_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda g, x: torch.ops.aten.silu_backward(g, x),
    "gelu": lambda g, x: torch.ops.aten.gelu_backward(g, x),
    "gelu_tanh": lambda g, x: torch.ops.aten.gelu_backward(g, x, approximate="tanh"),
    "quick_gelu": lambda g, x: g * _quick_gelu_grad(x),
    "relu": lambda g, x: g * (x > 0),
    "relu2": lambda g, x: g * 2 * torch.relu(x),
    "identity": lambda g, x: g,
}


def masked_dense(
    grad: Tensor,
    x: Tensor,
    active: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    down: Tensor,
    activation: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """grad: [T, d_out]; x: [T, d_model]; active: bool [T, n_experts].

    needs: which of (x, up, up_bias, gate, gate_bias, down, down_bias) want a gradient; the result is in that order,
    None where not wanted. The two pre-activations are computed again instead of kept: the fused forward has none.
    """
    group_size = up.shape[0] // active.shape[-1]
    mask = active.to(grad.dtype).repeat_interleave(group_size, -1)
    u = torch.nn.functional.linear(x, up, up_bias)
    g = None if gate is None else torch.nn.functional.linear(x, gate, gate_bias)
    act, act_grad = ACTIVATIONS[activation], ACTIVATION_GRADS[activation]
    dh = (grad @ down) * mask
    if g is None:
        h, du, dg = act(u), act_grad(dh, u), None
    else:
        a = act(g)
        h, du, dg = a * u, dh * a, act_grad(dh * u, g)

    def weight_grad(want: bool, out: Tensor | None, inp: Tensor) -> Tensor | None:
        return out.mT @ inp if want and out is not None else None

    def bias_grad(want: bool, out: Tensor | None) -> Tensor | None:
        return out.sum(0) if want and out is not None else None

    dx = None
    if needs[0]:
        dx = du @ up if gate is None or dg is None else du @ up + dg @ gate
    return (
        dx,
        weight_grad(needs[1], du, x),
        bias_grad(needs[2], du),
        weight_grad(needs[3], dg, x),
        bias_grad(needs[4], dg),
        weight_grad(needs[5], grad, h * mask),
        bias_grad(needs[6], grad),
    )
