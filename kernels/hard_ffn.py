"""The autograd function of the routed ops: hard mode with a frozen router. `backward.py` computes the gradients."""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves save_for_backward untyped)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import reference
from ltepass.kernels.autograd import Args
from ltepass.kernels.backward import gradients
from ltepass.kernels.routed_schema import RoutedOp


def hard_ffn(op: RoutedOp) -> type[torch.autograd.Function]:
    """Hard mode with a frozen router: gradients of x, up, gate, down and the biases; none of router and threshold."""
    with_mask = getattr(torch.ops.ltepass, f"{op.name}_with_mask")

    class HardFFN(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                return with_mask(*args)  # type: ignore[no-any-return]

        @staticmethod
        def setup_context(ctx: Any, inputs: Args, output: tuple[Tensor, Tensor, Tensor]) -> None:
            c = op.call(inputs)
            _, active, count = output
            ctx.mark_non_differentiable(active, count)
            ctx.save_for_backward(c.x, active, *c.weights[:5], c.cut, c.input_cut)
            ctx.activation, ctx.n_cuts = c.activation, len(inputs) - op.n_tensors - 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
            x, active, up, up_bias, gate, gate_bias, down, cut, input_cut = ctx.saved_tensors
            seen = reference.leave_out_small(x, input_cut)
            need, first = ctx.needs_input_grad, op.n_router + 2
            wanted = (need[0], *need[first : first + 6])
            rows = grad.reshape(-1, grad.shape[-1]), seen.reshape(-1, x.shape[-1]), active.reshape(-1, active.shape[-1])
            grads = gradients(*rows, up, up_bias, gate, gate_bias, down, ctx.activation, wanted, cut)
            dx = None if grads[0] is None else grads[0].reshape(x.shape)
            if dx is not None and input_cut is not None:
                dx = dx.masked_fill(reference.is_small(x, input_cut), 0.0)
            return (dx, *[None] * (first - 1), *grads[1:], *[None] * (1 + ctx.n_cuts))

    return HardFFN
