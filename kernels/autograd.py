"""How the ops of this folder differentiate: one `torch.autograd.Function` behind each, at the op's own Autograd key."""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves unpack_dual and Function.apply untyped)
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from ltepass.kernels import proxy_reference, reference
from ltepass.kernels.backward import gradients
from ltepass.kernels.proxy_reference import Proxy

if TYPE_CHECKING:
    from ltepass.kernels.routed_schema import RoutedOp

Args = tuple[Any, ...]


def refuse_tangents(name: str, args: Args, instead: str) -> None:
    """Without this a dual tensor goes through with a zero tangent, silently."""
    for t in args:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"{name} met a forward-mode AD tangent and has no formula for it; use reverse mode, or {instead}"
            )


def rule(
    op: torch._ops.OpOverload,
    function: type[torch.autograd.Function],
    instead: str,
    taken: Callable[[Any], object] = lambda outputs: outputs,
) -> Callable[..., object]:
    """The kernel of `op` at the Autograd key (with_keyset): `function` where a gradient is asked for, else the op.

    instead: what to do about forward-mode AD. taken: what the op returns of the function's outputs.
    """

    def call(keyset: torch._C.DispatchKeySet, *args: Any) -> object:
        if forward_ad._current_level >= 0:
            refuse_tangents(op.name(), args, instead)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # The C++ apply: torch.func's own wrapper of it would dispatch a second time, from inside this kernel.
            with enable_single_level_autograd_function():
                return taken(super(torch.autograd.Function, function).apply(*args))  # type: ignore[misc]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return call


def asks_for_gradients() -> bool:
    """Whether autograd, reverse or forward, may have to see what is called now."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def seen_by_others(x: object) -> bool:
    """Whether gradients, a compiler, a tracer or a dispatch mode may look on: they are to see the public op."""
    return asks_for_gradients() or is_compiling() or type(x) is not Tensor or bool(_len_torch_dispatch_stack())


def without_a_frame(name: str) -> Callable[..., Tensor]:
    """An op of ours as a lowered module calls it: where nothing can ask for a gradient, the Python frame of its
    autograd rule is passed by. Compilers, tracers and dispatch modes see the public op.
    """
    # Looked up once: reading weights pushes code out of the caches, and each step of a call then waits for memory.
    public, no_grad = getattr(torch.ops.ltepass, name).default, getattr(torch.ops.ltepass, f"_{name}_no_grad").default

    def call(*args: Tensor | None) -> Tensor:
        return public(*args) if seen_by_others(args[0]) else no_grad(*args)  # type: ignore[no-any-return]

    return call


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


def linear_function(name: str, bias_at: int, dense: Callable[..., Tensor] | None) -> type[torch.autograd.Function]:
    """Gradients of x, the bias and a float weight. Quantised weights are constants, and the rounding of x is passed by:
    dx = dy W. dense: of quantised weights, what makes a float one of them.
    """
    op = getattr(torch.ops.ltepass, name)

    class Linear(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(*args: Tensor | None) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)  # type: ignore[no-any-return]

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs[:bias_at])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, *weight = ctx.saved_tensors
            rows, wanted = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
            grads: list[Tensor | None] = [None] * len(wanted)
            if wanted[0]:
                grads[0] = grad @ (dense(*weight).to(grad.dtype) if dense else weight[0])
            if wanted[1]:
                grads[1] = rows.t() @ x.reshape(-1, x.shape[-1])
            if any(wanted[bias_at:]):
                grads[bias_at] = rows.sum(0)
            return tuple(grads)

    return Linear


class ProxyScores(torch.autograd.Function):
    """Gradients of x, the weight and the bias; codes, scales and sizes are constants."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*args: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ltepass.proxy_scores(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
        *tensors, _, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad
        wanted = (need[0], need[6], need[7])
        x, *constants, weight = ctx.saved_tensors
        proxy = Proxy(*constants)
        dx, d_weight, d_bias = proxy_reference.gradients(grad, x, proxy, weight, ctx.activation, wanted)
        return (dx, *[None] * 5, d_weight, d_bias, None)
