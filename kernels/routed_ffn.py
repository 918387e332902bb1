"""`ltepass::routed_ffn`: schema, fake, autograd and dispatch. Importing this registers the op and builds nothing.

The C++ kernel registers itself for CPU when it is loaded, on the first CPU call; until then, and on a machine without
a compiler, CPU calls land in `_any_device` below, which is also what any other device gets.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

import os
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import autograd, reference
from ltepass.kernels.autograd import Args
from ltepass.kernels.backward import gradients
from ltepass.kernels.cpu import build
from ltepass.kernels.gpu import traceable

_ARGUMENTS = (
    "(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor threshold, Tensor up, Tensor? up_bias, Tensor? gate, "
    "Tensor? gate_bias, Tensor down, Tensor? down_bias, str activation, Tensor? cut=None, "
    "Tensor? input_cut=None)"
)
_library = torch.library.Library("ltepass", "FRAGMENT")
_library.define(f"routed_ffn{_ARGUMENTS} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# The same without an autograd rule, whose Python frame every call would go through: `routed_ffn` below takes it.
_library.define(f"_routed_ffn_no_grad{_ARGUMENTS} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
# The same computation, with the decision beside it: mask bool [..., n_experts] and count int64 [], the number of
# (token, expert) pairs that were active. Tests compare masks first; the autograd formula keeps the mask it returns.
_library.define(f"routed_ffn_with_mask{_ARGUMENTS} -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
# What the C++ kernel calls for a dtype that it has no code for.
_library.define(f"_plain{_ARGUMENTS} -> (Tensor, Tensor)")
# The active share from which the C++ kernel leaves this many tokens to PyTorch's own GEMMs; above 1: it never does.
_library.define("_dense_above(Tensor x, int tokens) -> float")

_N_TENSORS = 10  # every argument before the activation; after it, `cut` and `input_cut` where they are given


def check(x: Tensor, router_weight: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str) -> None:
    """Shapes and dtypes that no path can make sense of; the C++ kernel makes the same checks itself."""
    if activation not in reference.ACTIVATIONS:
        raise LTEError(f"activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    d_model, d_ff, n_experts = x.shape[-1], up.shape[0], router_weight.shape[0]
    if up.shape[1] != d_model or router_weight.shape[1] != d_model or down.shape[1] != d_ff:
        raise LTEError(
            f"x is [..., {d_model}], router_weight {list(router_weight.shape)}, up {list(up.shape)}, down "
            f"{list(down.shape)}; expected [n_experts, d_model], [d_ff, d_model] and [d_out, d_ff]"
        )
    if gate is not None and gate.shape != up.shape:
        raise LTEError(f"gate is {list(gate.shape)} and up is {list(up.shape)}; expected equal shapes")
    if n_experts == 0 or d_ff % n_experts != 0:
        raise LTEError(f"d_ff is {d_ff} and there are {n_experts} experts; expected a whole number of neurons each")


def _plain(with_mask: bool, args: Args) -> Any:
    x, router_weight, router_bias, threshold, *weights = args[: _N_TENSORS + 2]
    _check(args)
    active = reference.mask(x, router_weight, router_bias, threshold)
    y = reference.masked_ffn(reference.leave_out_small(x, _input_cut(args)), active, *weights)
    return (y, active, active.sum()) if with_mask else y


def _input_cut(args: Args) -> Tensor | None:
    return args[_N_TENSORS + 2] if len(args) > _N_TENSORS + 2 else None


def _any_device(op: torch._ops.OpOverload, with_mask: bool) -> Callable[..., object]:
    def call(*args: Any) -> object:
        # A successful load has registered the C++ kernel under a key that outranks this one: call again.
        if args[0].device.type == "cpu" and build.load():
            return op(*args)
        return _plain(with_mask, args)

    return call


def _cuda(*args: Any) -> Tensor:
    from ltepass.kernels.gpu import launch

    _check(args)
    if _input_cut(args) is not None:
        return _plain(False, args)  # type: ignore[no-any-return]  # rows of up and gate lie whole on a GPU
    return launch.routed_ffn(*args[: _N_TENSORS + 2])


def _cuda_with_mask(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ltepass.kernels.gpu import launch

    _check(args)
    if _input_cut(args) is not None:
        return _plain(True, args)  # type: ignore[no-any-return]
    y, active = launch.routed_ffn_with_mask(*args[: _N_TENSORS + 2])
    return y, active, active.sum()


def _check(args: Args) -> None:
    x, router_weight, up, gate, down = args[0], args[1], args[4], args[6], args[8]
    check(x, router_weight, up, gate, down, args[_N_TENSORS])


def _fake(*args: Any) -> Tensor:
    _check(args)
    x, down = args[0], args[8]
    return x.new_empty((*x.shape[:-1], down.shape[0]))  # type: ignore[no-any-return]


def _fake_with_mask(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, router_weight = args[0], args[1]
    mask = x.new_empty((*x.shape[:-1], router_weight.shape[0]), dtype=torch.bool)
    return _fake(*args), mask, x.new_empty((), dtype=torch.int64)


class _HardFFN(torch.autograd.Function):
    """Hard mode with a frozen router: gradients of x, up, gate, down and the biases; none of router and threshold."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.ltepass.routed_ffn_with_mask(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Args, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, _, _, _, up, up_bias, gate, gate_bias, down, _, activation, *cuts = inputs
        _, active, count = output
        ctx.mark_non_differentiable(active, count)
        ctx.save_for_backward(x, active, up, up_bias, gate, gate_bias, down, *cuts)
        ctx.activation = activation

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        x, active, up, up_bias, gate, gate_bias, down, *cuts = ctx.saved_tensors
        cut, input_cut = (*cuts, None, None)[:2]
        seen = reference.leave_out_small(x, input_cut)
        need = ctx.needs_input_grad
        wanted = (need[0], need[4], need[5], need[6], need[7], need[8], need[9])
        flat = (grad.reshape(-1, grad.shape[-1]), seen.reshape(-1, x.shape[-1]), active.reshape(-1, active.shape[-1]))
        grads = gradients(*flat, up, up_bias, gate, gate_bias, down, ctx.activation, wanted, cut)
        dx = None if grads[0] is None else grads[0].reshape(x.shape)
        if dx is not None and input_cut is not None:
            dx = dx.masked_fill(reference.is_small(x, input_cut), 0.0)
        return (dx, None, None, None, *grads[1:], *[None] * (1 + len(cuts)))


def _vmap(with_mask: bool) -> Callable[..., object]:
    def rule(info: object, in_dims: tuple[int | None, ...], *args: Any) -> object:
        if any(d is not None for d in in_dims[1:_N_TENSORS]):
            raise NotImplementedError(
                "vmap over the weights of ltepass::routed_ffn; expected only x to be batched, every other in_dim None"
            )
        x = args[0].movedim(in_dims[0], 0)
        if not with_mask:
            return torch.ops.ltepass.routed_ffn(x, *args[1:]), 0
        y, mask, _ = torch.ops.ltepass.routed_ffn_with_mask(x, *args[1:])
        return (y, mask, mask.flatten(1).sum(1)), (0, 0, 0)

    return rule


def _register() -> None:
    ops = torch.ops.ltepass
    _library.impl("_plain", lambda *args: _plain(True, args)[:2], "CompositeExplicitAutograd")
    rules = (
        ("routed_ffn", False, True, _fake, _cuda),
        ("_routed_ffn_no_grad", False, False, _fake, _cuda),
        ("routed_ffn_with_mask", True, True, _fake_with_mask, _cuda_with_mask),
    )
    for name, with_mask, differentiable, fake, cuda in rules:
        op = getattr(ops, name).default
        _library.impl(name, _any_device(op, with_mask), "CompositeExplicitAutograd")
        _library.impl(name, cuda, "CUDA")
        if differentiable:
            taken = (lambda outputs: outputs) if with_mask else itemgetter(0)
            rule = autograd.rule(op, _HardFFN, "ltepass.unlower(model) and the masked form", taken)
            _library.impl(name, rule, "Autograd", with_keyset=True)
        else:
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ltepass::{name}", fake, lib=_library)
        torch.library.register_vmap(f"ltepass::{name}", _vmap(with_mask), lib=_library)
    traceable.register(_library)


_register()


def _one_thread() -> None:
    """A forked child inherits OpenMP's notion of a pool and none of its threads: the next parallel loop would wait for
    them for ever, in our kernel as in torch's own.
    """
    if build.loaded():
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
# Looked up once: reading weights pushes code out of the caches, and each step of a call then waits for memory.
_routed_ffn = torch.ops.ltepass.routed_ffn.default
_routed_ffn_no_grad = torch.ops.ltepass._routed_ffn_no_grad.default


def routed_ffn(*args: object) -> Tensor:
    """The op as a lowered module calls it. Where nothing can ask for a gradient, the Python frame of its autograd rule
    is passed by. Compilers, tracers and dispatch modes see the public op.
    """
    if autograd.seen_by_others(args[0]):
        return _routed_ffn(*args)  # type: ignore[no-any-return]
    return _routed_ffn_no_grad(*args)  # type: ignore[no-any-return]


def which_path(T: int, d_model: int, d_ff: int, n_experts: int, dtype: torch.dtype) -> str:
    """The path a CPU call of this shape takes: what the report prints. T is the number of tokens."""
    return build.which_path(T, d_model, d_ff, n_experts, dtype)
