"""Backward of the hard mode with a frozen router: the decision is a constant here.

Two forms of the same gradients. `masked_dense` is plain PyTorch without data-dependent shapes: it traces, compiles and
differentiates again. `per_expert` computes the active (token, expert) pairs alone; `gradients` takes it where it can
run and measures faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ltepass.kernels import reference
from ltepass.kernels.reference import ACTIVATIONS, is_small

if TYPE_CHECKING:
    from ltepass.kernels.routed_schema import RoutedOp
from ltepass.kernels.dispatch import Args


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


# Where a loop over experts beats dense products (1 thread, fp32, see README.md, Backward): 1.3-1.4x at 20 %
# active and experts of 32, 0.7-0.8x at 50 %, 0.2-0.5x with experts of 8.
MOST_ACTIVE = 0.33
LEAST_GROUP = 32
LEAST_TOKENS = 100  # an expert, on average


def gradients(
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
    cut: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`masked_dense` or `per_expert`, which take the same arguments: whichever measures faster and can run here."""
    args = (grad, x, active, up, up_bias, gate, gate_bias, down, activation, needs, cut)
    group_size = up.shape[0] // active.shape[-1]
    if not _eager(grad, x, active, up) or x.device.type != "cpu":
        return masked_dense(*args)
    pairs = int(active.sum())
    pays = pairs <= MOST_ACTIVE * active.numel() and pairs >= LEAST_TOKENS * active.shape[-1]
    return (per_expert if pays and group_size >= LEAST_GROUP else masked_dense)(*args)


def _eager(*tensors: Tensor) -> bool:
    """Shapes may depend on data: nothing traces, batches or differentiates this backward."""
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped_tensor(t) for t in tensors)
    return plain and not torch.is_grad_enabled() and _get_current_dispatch_mode() is None


def _hidden(
    u: Tensor, g: Tensor | None, dh: Tensor, activation: str, cut: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden units, and the gradients of the pre-activations u and g (None: plain) from that of the hidden units."""
    act, act_grad = ACTIVATIONS[activation], ACTIVATION_GRADS[activation]
    a = act(u if g is None else g)
    h = a if g is None else a * u
    if cut is not None:
        small = is_small(h, cut)
        h, dh = h.masked_fill(small, 0.0), dh.masked_fill(small, 0.0)
    if g is None:
        return h, act_grad(dh, u), None
    return h, dh * a, act_grad(dh * u, g)


def per_expert(
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
    cut: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients from the active pairs alone, expert by expert; see `masked_dense` for the arguments.

    Sums over experts (of dx) are kept in fp32 or wider. An expert that no token chose is never read.
    """
    group_size = up.shape[0] // active.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.zeros_like(x, dtype=wide) if needs[0] else None
    sources = (up, up_bias, gate, gate_bias, down)
    d_up, d_up_bias, d_gate, d_gate_bias, d_down = (
        torch.zeros_like(t) if want and t is not None else None for t, want in zip(sources, needs[1:6], strict=True)
    )
    expert_tokens = active.T.nonzero()[:, 1].split(active.sum(0).tolist())
    for e, tokens in enumerate(expert_tokens):
        if len(tokens) == 0:
            continue
        own = slice(e * group_size, (e + 1) * group_size)
        x_e, grad_e = x[tokens], grad[tokens]
        u = F.linear(x_e, up[own], None if up_bias is None else up_bias[own])
        dh = grad_e @ down[:, own]
        g = None if gate is None else F.linear(x_e, gate[own], None if gate_bias is None else gate_bias[own])
        h, du, dg = _hidden(u, g, dh, activation, cut)
        if dx is not None:
            dx_e = du @ up[own] if gate is None or dg is None else torch.addmm(du @ up[own], dg, gate[own])
            dx.index_add_(0, tokens, dx_e.to(dx.dtype))
        for out, d in ((d_up, du), (d_gate, dg)):
            if out is not None and d is not None:
                torch.mm(d.mT, x_e, out=out[own])
        for out, d in ((d_up_bias, du), (d_gate_bias, dg)):
            if out is not None and d is not None:
                out[own] = d.sum(0)
        if d_down is not None:
            d_down[:, own] = grad_e.mT @ h
    d_down_bias = grad.sum(0) if needs[6] else None
    dx = None if dx is None else dx.to(x.dtype)
    return dx, d_up, d_up_bias, d_gate, d_gate_bias, d_down, d_down_bias


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
    cut: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """grad: [T, d_out]; x: [T, d_model]; active: bool [T, n_experts].

    needs: which of (x, up, up_bias, gate, gate_bias, down, down_bias) want a gradient; the result is in that order,
    None where not wanted. The two pre-activations are computed again instead of kept: the fused forward has none.
    """
    group_size = up.shape[0] // active.shape[-1]
    mask = active.to(grad.dtype).repeat_interleave(group_size, -1)
    u = F.linear(x, up, up_bias)
    g = None if gate is None else F.linear(x, gate, gate_bias)
    h, du, dg = _hidden(u, g, (grad @ down) * mask, activation, cut)

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
