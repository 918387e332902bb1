"""`ltepass::routed_ffn` and `routed_proxy_ffn`: schema, fake, autograd and dispatch. They differ in what decides.

Importing this registers the ops and builds nothing. The C++ kernel registers itself for CPU when it is loaded, on the
first CPU call; until then, and on a machine without a compiler, CPU calls land in `_any_device` below, which is also
what any other device gets.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import autograd, proxy, proxy_reference, reference
from ltepass.kernels.autograd import Args
from ltepass.kernels.backward import gradients
from ltepass.kernels.cpu import build
from ltepass.kernels.gpu import traceable

_library = torch.library.Library("ltepass", "FRAGMENT")
# The active share from which the C++ kernel leaves this many tokens to PyTorch's own GEMMs; above 1: it never does.
_library.define("_dense_above(Tensor x, int tokens, int group) -> float")


class _Call(NamedTuple):
    """An op's arguments by what they are for. weights: up, up_bias, gate, gate_bias, down, down_bias."""

    x: Tensor
    router: Args
    threshold: Tensor
    weights: Args
    activation: str
    cut: Tensor | None
    input_cut: Tensor | None


@dataclass(frozen=True)
class _Op:
    """One op of this file. router: what decides, as a schema; plain: the name of what C++ calls for other dtypes."""

    name: str
    router: str
    n_router: int
    plain: str

    @property
    def arguments(self) -> str:
        return (
            f"(Tensor x, {self.router}, Tensor threshold, Tensor up, Tensor? up_bias, Tensor? gate, Tensor? gate_bias, "
            "Tensor down, Tensor? down_bias, str activation, Tensor? cut=None, Tensor? input_cut=None)"
        )

    @property
    def n_tensors(self) -> int:
        """Every argument before the activation; after it, `cut` and `input_cut` where they are given."""
        return self.n_router + 8

    def call(self, args: Args) -> _Call:
        n = 1 + self.n_router
        cut, input_cut = (*args[self.n_tensors + 1 :], None, None)[:2]
        return _Call(args[0], args[1:n], args[n], args[n + 1 : n + 7], args[self.n_tensors], cut, input_cut)

    def checked(self, args: Args) -> _Call:
        """Raises LTEError for shapes and dtypes that no path can make sense of."""
        c = self.call(args)
        up, _, gate, _, down, _ = c.weights
        if self is LINEAR:
            check(c.x, c.router[0], up, gate, down, c.activation)
            return c
        proxy.checked((c.x, *c.router, c.activation))
        _check_neurons(c.x, up, gate, down, self.n_experts(c))
        codes = c.router[0]
        if codes.shape[:2] != (1 if gate is None else 2, up.shape[0]):
            raise LTEError(f"codes are {list(codes.shape)} and up is {list(up.shape)}; expected codes of this FFN")
        return c

    def n_experts(self, c: _Call) -> int:
        weight = c.router[0] if self is LINEAR else c.router[-2]
        return weight.shape[0]  # type: ignore[no-any-return]

    def mask(self, c: _Call) -> Tensor:
        """bool [..., n_experts]: the definition of the decision."""
        if self is LINEAR:
            return reference.mask(*[c.x, *c.router, c.threshold])
        return proxy_reference.scores(*proxy.call((c.x, *c.router, c.activation))) > c.threshold


LINEAR = _Op("routed_ffn", "Tensor router_weight, Tensor? router_bias", 2, "_plain")
PROXY = _Op("routed_proxy_ffn", proxy.ROUTER, proxy.N_ROUTER, "_plain_proxy")
for _op in (LINEAR, PROXY):
    # The second is the same without an autograd rule, whose Python frame every call would go through. The third has
    # the decision beside the result: mask bool [..., n_experts] and count int64 [], the number of (token, expert) pairs
    # that were active. Tests compare masks first; the autograd formula keeps the mask it returns.
    for _name, _result in (
        (_op.name, "Tensor"),
        (f"_{_op.name}_no_grad", "Tensor"),
        (f"{_op.name}_with_mask", "(Tensor, Tensor, Tensor)"),
    ):
        _library.define(f"{_name}{_op.arguments} -> {_result}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(f"{_op.plain}{_op.arguments} -> (Tensor, Tensor)")  # for a dtype that C++ has no code for


def check(x: Tensor, router_weight: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str) -> None:
    """Shapes and dtypes that no path can make sense of; the C++ kernel makes the same checks itself."""
    if activation not in reference.ACTIVATIONS:
        raise LTEError(f"activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    if router_weight.shape[1] != x.shape[-1]:
        raise LTEError(
            f"x is [..., {x.shape[-1]}] and router_weight {list(router_weight.shape)}; expected [n_experts, d_model]"
        )
    _check_neurons(x, up, gate, down, router_weight.shape[0])


def _check_neurons(x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, n_experts: int) -> None:
    d_model, d_ff = x.shape[-1], up.shape[0]
    if up.shape[1] != d_model or down.shape[1] != d_ff:
        raise LTEError(
            f"x is [..., {d_model}], up {list(up.shape)}, down {list(down.shape)}; expected [d_ff, d_model] and "
            "[d_out, d_ff]"
        )
    if gate is not None and gate.shape != up.shape:
        raise LTEError(f"gate is {list(gate.shape)} and up is {list(up.shape)}; expected equal shapes")
    if n_experts == 0 or d_ff % n_experts != 0:
        raise LTEError(f"d_ff is {d_ff} and there are {n_experts} experts; expected a whole number of neurons each")


def _plain(op: _Op, with_mask: bool, args: Args) -> Any:
    c = op.checked(args)
    active = op.mask(c)
    seen = reference.leave_out_small(c.x, c.input_cut)
    y = reference.masked_ffn(*[seen, active, *c.weights, c.activation, c.cut])
    return (y, active, active.sum()) if with_mask else y


def _any_device(op: _Op, name: str, with_mask: bool) -> Callable[..., object]:
    public = getattr(torch.ops.ltepass, name).default

    def call(*args: Any) -> object:
        # A successful load has registered the C++ kernel under a key that outranks this one: call again.
        if args[0].device.type == "cpu" and build.load():
            return public(*args)
        return _plain(op, with_mask, args)

    return call


def _cuda(*args: Any) -> Tensor:
    from ltepass.kernels.gpu import launch

    if LINEAR.checked(args).input_cut is not None:
        return _plain(LINEAR, False, args)  # type: ignore[no-any-return]  # rows of up and gate lie whole on a GPU
    return launch.routed_ffn(*args[: LINEAR.n_tensors + 2])


def _cuda_with_mask(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ltepass.kernels.gpu import launch

    if LINEAR.checked(args).input_cut is not None:
        return _plain(LINEAR, True, args)  # type: ignore[no-any-return]
    y, active = launch.routed_ffn_with_mask(*args[: LINEAR.n_tensors + 2])
    return y, active, active.sum()


def _fake(op: _Op, with_mask: bool) -> Callable[..., object]:
    def call(*args: object) -> object:
        c = op.checked(args)
        down = c.weights[4]
        y = c.x.new_empty((*c.x.shape[:-1], down.shape[0]))
        if not with_mask:
            return y
        mask = c.x.new_empty((*c.x.shape[:-1], op.n_experts(c)), dtype=torch.bool)
        return y, mask, c.x.new_empty((), dtype=torch.int64)

    return call


def _hard_ffn(op: _Op) -> type[torch.autograd.Function]:
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


def _vmap(op: _Op, with_mask: bool) -> Callable[..., object]:
    def rule(info: object, in_dims: tuple[int | None, ...], *args: Any) -> object:
        if any(d is not None for d in in_dims[1 : op.n_tensors]):
            raise NotImplementedError(
                f"vmap over the weights of ltepass::{op.name}; expected only x to be batched, every other in_dim None"
            )
        x = args[0].movedim(in_dims[0], 0)
        if not with_mask:
            return getattr(torch.ops.ltepass, op.name)(x, *args[1:]), 0
        y, mask, _ = getattr(torch.ops.ltepass, f"{op.name}_with_mask")(x, *args[1:])
        return (y, mask, mask.flatten(1).sum(1)), (0, 0, 0)

    return rule


def _register(op: _Op) -> None:
    _library.impl(op.plain, lambda *args: _plain(op, True, args)[:2], "CompositeExplicitAutograd")
    function = _hard_ffn(op)
    for name, with_mask, differentiable in (
        (op.name, False, True),
        (f"_{op.name}_no_grad", False, False),
        (f"{op.name}_with_mask", True, True),
    ):
        public = getattr(torch.ops.ltepass, name).default
        _library.impl(name, _any_device(op, name, with_mask), "CompositeExplicitAutograd")
        if op is LINEAR:
            _library.impl(name, _cuda_with_mask if with_mask else _cuda, "CUDA")
        if differentiable:
            taken = (lambda outputs: outputs) if with_mask else itemgetter(0)
            rule = autograd.rule(public, function, "ltepass.unlower(model) and the masked form", taken)
            _library.impl(name, rule, "Autograd", with_keyset=True)
        else:
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ltepass::{name}", _fake(op, with_mask), lib=_library)
        torch.library.register_vmap(f"ltepass::{name}", _vmap(op, with_mask), lib=_library)


_register(LINEAR)
_register(PROXY)
traceable.register(_library)


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
_routed_proxy_ffn = torch.ops.ltepass.routed_proxy_ffn.default
_routed_proxy_ffn_no_grad = torch.ops.ltepass._routed_proxy_ffn_no_grad.default


def routed_ffn(*args: object) -> Tensor:
    """The op as a lowered module calls it. Where nothing can ask for a gradient, the Python frame of its autograd rule
    is passed by. Compilers, tracers and dispatch modes see the public op.
    """
    if autograd.seen_by_others(args[0]):
        return _routed_ffn(*args)  # type: ignore[no-any-return]
    return _routed_ffn_no_grad(*args)  # type: ignore[no-any-return]


def routed_proxy_ffn(*args: object) -> Tensor:
    """The same of a proxy's."""
    if autograd.seen_by_others(args[0]):
        return _routed_proxy_ffn(*args)  # type: ignore[no-any-return]
    return _routed_proxy_ffn_no_grad(*args)  # type: ignore[no-any-return]


def which_path(T: int, d_model: int, d_ff: int, n_experts: int, dtype: torch.dtype) -> str:
    """The path a CPU call of this shape takes: what the report prints. T is the number of tokens."""
    return build.which_path(T, d_model, d_ff, n_experts, dtype)
