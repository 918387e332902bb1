"""`ltepass::linear`, `linear_int8` and `linear_int4`: schemas, checks, fakes, autograd, dispatch.

`linear_reference.py` holds the definitions, `weight_formats.py` the formats. Importing this registers the ops and
builds nothing.

The C++ kernels register themselves for CPU when they are loaded, on the first CPU call; until then, without a compiler,
and on any other device, calls land in `_definition` below.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.errors import LTEError
from ltepass.kernels import (
    dispatch,
    linear_reference,
    routed_ffn,  # noqa: F401 -- one object holds the kernels of both: each finds its op defined
    weight_formats,
)
from ltepass.kernels.dispatch import any_device, vmap_over_x
from ltepass.kernels.weight_formats import BLOCK, HALF

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """What no path of `linear` can make sense of; the C++ kernel makes the same checks itself."""
    _check_matrix("weight", weight, x.dtype)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise LTEError(f"x is {words(x)} and weight {words(weight)}; expected [..., d_in] and [d_out, d_in]")
    _check_bias(bias, x, weight.shape[0])


def check_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """What no path of `linear_int8` can make sense of."""
    _check_input(x)
    _check_matrix("codes", codes, torch.int8)
    if x.dim() == 0 or x.shape[-1] != codes.shape[1]:
        raise LTEError(f"x is {words(x)} and codes {words(codes)}; expected [..., d_in] and [d_out, d_in]")
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        raise LTEError(f"scale is {words(scale)}; expected float32 [{codes.shape[0]}], one for each row of codes")
    _check_bias(bias, x, codes.shape[0])


def check_int4(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor | None, bias: Tensor | None = None) -> None:
    """What no path of `linear_int4` can make sense of."""
    _check_input(x)
    _check_matrix("codes", codes, torch.uint8)
    d_in = 2 * codes.shape[1]
    if d_in % BLOCK:
        raise LTEError(f"codes are {words(codes)}, two a byte: d_in is {d_in}; expected a multiple of {BLOCK}")
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise LTEError(
            f"x is {list(x.shape)} and codes {list(codes.shape)}; expected [..., d_in] and [d_out, d_in / 2]"
        )
    for name, t in (("scale", scale), ("minimum", minimum)):
        if t is not None and (t.dtype != torch.float16 or t.shape != (codes.shape[0], codes.shape[1] // HALF)):
            expected = f"float16 [{codes.shape[0]}, {d_in // BLOCK}], one for each block of {BLOCK}"
            raise LTEError(f"{name} is {words(t)}; expected {expected}")
    _check_bias(bias, x, codes.shape[0])


def words(t: Tensor) -> str:
    """For a message: "float32 [40, 64]"."""
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _check_input(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise LTEError(f"x is {words(x)}; expected float32, bfloat16 or float16")


def _check_matrix(name: str, t: Tensor, dtype: torch.dtype) -> None:
    if t.dim() != 2 or t.dtype != dtype:
        raise LTEError(f"{name} is {words(t)}; expected a matrix of {str(dtype).removeprefix('torch.')}")


def _check_bias(bias: Tensor | None, x: Tensor, d_out: int) -> None:
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (d_out,)):
        expected = f"{str(x.dtype).removeprefix('torch.')} [{d_out}], x's dtype and one for each output"
        raise LTEError(f"bias is {words(bias)}; expected {expected}")


# Arguments, and the place of the bias among them.
_SCHEMAS = {
    "linear": ("(Tensor x, Tensor weight, Tensor? bias=None)", 2),
    "linear_int8": ("(Tensor x, Tensor codes, Tensor scale, Tensor? bias=None)", 3),
    "linear_int4": ("(Tensor x, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias=None)", 4),
}
_library = torch.library.Library("ltepass", "FRAGMENT")


_CHECKS: dict[str, Callable[..., None]] = {"linear": check, "linear_int8": check_int8, "linear_int4": check_int4}
_DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "linear_int8": linear_reference.linear_int8,
    "linear_int4": linear_reference.linear_int4,
}
_DENSE: dict[str, Callable[..., Tensor]] = {
    "linear_int8": weight_formats.dequantise_int8,
    "linear_int4": weight_formats.dequantise_int4,
}


def _definition(name: str) -> Callable[..., Tensor]:
    def call(x: Tensor, *weights: Tensor | None) -> Tensor:
        _CHECKS[name](x, *weights)
        return _DEFINITIONS[name](x, *weights)

    return call


def _fake(name: str) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
        _CHECKS[name](x, weight, *others)
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    return call


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


def _register() -> None:
    for name, (schema, bias_at) in _SCHEMAS.items():
        # The second is the same without an autograd rule, whose Python frame every call would go through.
        for full in (name, f"_{name}_no_grad"):
            _library.define(f"{full}{schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
            op = getattr(torch.ops.ltepass, full).default
            _library.impl(full, any_device(op, _definition(name)), "CompositeExplicitAutograd")
            torch.library.register_fake(f"ltepass::{full}", _fake(name), lib=_library)
            torch.library.register_vmap(f"ltepass::{full}", vmap_over_x(op), lib=_library)
        public = getattr(torch.ops.ltepass, name).default
        function = linear_function(name, bias_at, _DENSE.get(name))
        rule = dispatch.rule(public, function, "torch.nn.functional.linear")
        _library.impl(name, rule, "Autograd", with_keyset=True)
        _library.impl(f"_{name}_no_grad", torch.library.fallthrough_kernel, "Autograd")


_register()


linear = dispatch.without_a_frame("linear")
linear_int8 = dispatch.without_a_frame("linear_int8")
linear_int4 = dispatch.without_a_frame("linear_int4")
