"""`ltepass::packed_tiered_ffn`: `ltepass::tiered_ffn` of planes that were packed (`packed_planes.py`) when a model was
lowered. Schema, checks, fake, dispatch; the definition is that of what was packed.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import dispatch, packed_planes, reference, tiers
from ltepass.kernels.dispatch import Args, any_device, vmap_over_x
from ltepass.kernels.linear import words
from ltepass.kernels.packed_planes import Packed

NAME = "packed_tiered_ffn"
_ARGUMENTS = (
    "(Tensor x, Tensor high, Tensor low, Tensor? biases, Tensor sizes, Tensor router_weight, Tensor router_bias, "
    "Tensor threshold, Tensor floor, Tensor? down_bias, str activation) -> Tensor"
)
_library = torch.library.Library("ltepass", "FRAGMENT")


class Call(NamedTuple):
    """The op's arguments by what they are for."""

    x: Tensor
    packed: Packed
    biases: Tensor | None
    sizes: Tensor
    weight: Tensor
    bias: Tensor
    threshold: Tensor
    floor: Tensor
    down_bias: Tensor | None
    activation: str


def call(args: Args) -> Call:
    x, high, low, *others = args
    return Call(x, Packed(high, low), *others)


def checked(args: Args) -> Call:
    """Raises LTEError for shapes and dtypes that no path can make sense of; the C++ kernel makes the same checks."""
    c = call(args)
    if c.activation not in reference.ACTIVATIONS:
        raise LTEError(f"activation is {c.activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    if not c.x.is_floating_point() or c.x.dim() == 0:
        raise LTEError(f"x is {words(c.x)}; expected floats [..., d_model]")
    low = c.packed.low
    if low.dim() != 3 or low.shape[1] not in (2, 3) or low.shape[0] == 0:
        raise LTEError(f"low is {words(low)}; expected uint8 [d_ff, 2 or 3, bytes]")
    (d_ff, linears, _), d_model = low.shape, c.x.shape[-1]
    high_shape, low_shape = packed_planes.shapes(linears - 1, d_ff, d_model)
    floats = torch.float32
    expected = {
        "high": (c.packed.high, torch.uint8, high_shape),
        "low": (low, torch.uint8, low_shape),
        "biases": (c.biases, floats, (linears - 1, d_ff)),
        "sizes": (c.sizes, floats, (d_ff,)),
        "router_weight": (c.weight, floats, (d_ff,)),
        "router_bias": (c.bias, floats, ()),
        "threshold": (c.threshold, floats, ()),
        "floor": (c.floor, floats, ()),
        "down_bias": (c.down_bias, c.x.dtype, (d_model,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise LTEError(f"{name} is {words(tensor)}; expected {wanted}")
    return c


def unpacked(args: Args) -> Args:
    """The arguments of `ltepass::tiered_ffn` that say the same."""
    c = checked(args)
    planes = packed_planes.unpack(c.packed, c.x.shape[-1])
    router = (*planes.high, c.biases, c.sizes, c.weight, c.bias)
    return (c.x, *router, c.threshold, c.floor, *planes.down, *planes.low, c.down_bias, c.activation)


def definition(*args: object) -> Tensor:
    """What the op computes, in plain PyTorch."""
    return tiers.definition(*unpacked(args))


def _register() -> None:
    for name in (NAME, f"_{NAME}_no_grad"):
        _library.define(f"{name}{_ARGUMENTS}", tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(torch.ops.ltepass, name).default
        _library.impl(name, any_device(op, definition), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ltepass::{name}", lambda *args: torch.empty_like(checked(args).x), lib=_library)
        torch.library.register_vmap(f"ltepass::{name}", vmap_over_x(op), lib=_library)
    public, instead = getattr(torch.ops.ltepass, NAME).default, "ltepass.unlower(model)"
    rule = dispatch.rule(public, dispatch.no_gradient(public, instead), instead)
    _library.impl(NAME, rule, "Autograd", with_keyset=True)
    _library.impl(f"_{NAME}_no_grad", torch.library.fallthrough_kernel, "Autograd")


_register()
packed_tiered_ffn = dispatch.without_a_frame(NAME)
