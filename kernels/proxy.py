"""`ltepass::proxy_scores`: schema, checks, fake, autograd, dispatch; `proxy_reference.py` is the definition.

As with the other ops, the C++ kernel registers itself on the first CPU call; until then, without a compiler and on any
other device the definition runs, and gives the same bits.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import dispatch, proxy_codes, proxy_reference, reference
from ltepass.kernels.dispatch import Args, any_device, vmap_over_x
from ltepass.kernels.linear import words
from ltepass.kernels.proxy_reference import Proxy
from ltepass.kernels.weight_formats import HALF

# What a proxy is, in every op that holds one, after x.
ROUTER = (
    "Tensor codes, Tensor? multipliers, Tensor scales, Tensor? biases, Tensor sizes, Tensor router_weight, "
    "Tensor router_bias"
)
N_ROUTER: int = len(Proxy._fields) + 2
_library = torch.library.Library("ltepass", "FRAGMENT")
_library.define(f"proxy_scores(Tensor x, {ROUTER}, str activation) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class Call(NamedTuple):
    """The op's arguments by what they are for."""

    x: Tensor
    proxy: Proxy
    weight: Tensor
    bias: Tensor
    activation: str


def call(args: Args) -> Call:
    x, *constants, weight, bias, activation = args
    return Call(x, Proxy(*constants), weight, bias, activation)


def checked(args: Args) -> Call:
    """Raises LTEError for shapes and dtypes that no path can make sense of; the C++ kernel makes the same checks."""
    c = call(args)
    x, weight, activation = c.x, c.weight, c.activation
    codes, multipliers, scales, biases, sizes = c.proxy
    if activation not in reference.ACTIVATIONS:
        raise LTEError(f"activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    if not x.is_floating_point() or x.dim() == 0:
        raise LTEError(f"x is {words(x)}; expected floats [..., d_model]")
    blocks = proxy_codes.blocks_of(x.shape[-1])
    if codes.dim() != 3 or codes.dtype != torch.uint8 or codes.shape[0] not in (1, 2):
        raise LTEError(f"codes are {words(codes)}; expected uint8 [1 or 2, d_ff, {HALF * blocks}], two a byte")
    k, d_ff, n_experts = codes.shape[0], codes.shape[1], weight.shape[0] if weight.dim() == 1 else 0
    expected = {
        "codes": (codes, torch.uint8, (k, d_ff, HALF * blocks)),
        "multipliers": (multipliers, torch.uint8, (k, d_ff, blocks)),
        "scales": (scales, torch.float32, (k, d_ff)),
        "biases": (biases, torch.float32, (k, d_ff)),
        "sizes": (sizes, torch.float32, (d_ff,)),
        "router_weight": (weight, torch.float32, (n_experts,)),
        "router_bias": (c.bias, torch.float32, ()),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise LTEError(
                f"{name} is {words(tensor)} beside x {list(x.shape)} and codes {list(codes.shape)}; expected "
                f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            )
    if n_experts == 0 or d_ff % n_experts:
        raise LTEError(f"d_ff is {d_ff} and there are {n_experts} experts; expected a whole number of neurons each")
    return c


def _definition(*args: object) -> Tensor:
    return proxy_reference.scores(*checked(args))


def _fake(*args: object) -> Tensor:
    c = checked(args)
    return c.x.new_empty((*c.x.shape[:-1], c.weight.shape[0]), dtype=torch.float32)


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


def _register() -> None:
    op = torch.ops.ltepass.proxy_scores.default
    _library.impl("proxy_scores", any_device(op, _definition), "CompositeExplicitAutograd")
    rule = dispatch.rule(op, ProxyScores, "ltepass.kernels.proxy_reference.scores")
    _library.impl("proxy_scores", rule, "Autograd", with_keyset=True)
    torch.library.register_fake("ltepass::proxy_scores", _fake, lib=_library)
    torch.library.register_vmap("ltepass::proxy_scores", vmap_over_x(op), lib=_library)


_register()
proxy_scores = torch.ops.ltepass.proxy_scores.default
