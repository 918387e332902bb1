"""`ltepass::tiered_ffn`, and `ltepass::tiers`, what of it eager models call: schemas, checks, fake, dispatch.

`tiers_reference.py` is the definition. As with the other ops, the C++ kernel registers itself on the first CPU call;
until then, without a compiler and on any other device the definition runs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import dispatch, proxy, proxy_reference, tiers_reference
from ltepass.kernels.dispatch import Args, any_device, vmap_over_x
from ltepass.kernels.linear import words
from ltepass.kernels.proxy_codes import Codes
from ltepass.kernels.tiers_reference import Planes, planes_of
from ltepass.kernels.weight_formats import HALF

_PLANES = (
    "Tensor down_codes, Tensor down_multipliers, Tensor down_scales, "
    "Tensor low_codes, Tensor low_multipliers, Tensor low_scales"
)
_ROUTER = f"{proxy.ROUTER}, Tensor threshold, Tensor floor"
_ARGUMENTS = f"(Tensor x, {_ROUTER}, {_PLANES}, Tensor? down_bias, str activation) -> Tensor"
_GIVEN = (
    "(Tensor x, Tensor logits, Tensor threshold, Tensor floor, Tensor codes, Tensor? multipliers, Tensor scales, "
    f"{_PLANES}, Tensor? biases, str activation) -> Tensor"
)  # what was decided
_N_DECIDING = 1 + proxy.N_ROUTER  # x and the router
_library = torch.library.Library("ltepass", "FRAGMENT")


class Call(NamedTuple):
    """The op's arguments by what they are for."""

    deciding: proxy.Call
    threshold: Tensor
    floor: Tensor
    planes: Planes
    down_bias: Tensor | None

    @property
    def x(self) -> Tensor:
        return self.deciding.x


def call(args: Args) -> Call:
    deciding = proxy.call((*args[:_N_DECIDING], args[-1]))
    threshold, floor, *planes, down_bias = args[_N_DECIDING:-1]
    high, biases = Codes(*deciding.proxy[:3]), deciding.proxy.biases
    return Call(deciding, threshold, floor, Planes(high, Codes(*planes[:3]), Codes(*planes[3:]), biases), down_bias)


def checked(args: Args) -> Call:
    """Raises LTEError for shapes and dtypes that no path can make sense of; the C++ kernel makes the same checks."""
    proxy.checked((*args[:_N_DECIDING], args[-1]))
    c = call(args)
    k, d_ff, width = c.planes.high.codes.shape
    if len(c.deciding.weight) != d_ff:
        raise LTEError(f"router_weight is {words(c.deciding.weight)}; expected one of each of the {d_ff} neurons")
    blocks, d_model = width // HALF, c.x.shape[-1]
    expected = {
        f"{plane}_{part}": (tensor, dtype, (linears, d_ff, *size))
        for plane, linears, codes in (("down", 1, c.planes.down), ("low", k + 1, c.planes.low))
        for part, tensor, dtype, size in zip(
            Codes._fields, codes, (torch.uint8, torch.uint8, torch.float32), ((width,), (blocks,), ()), strict=True
        )
    }
    expected |= {name: (t, torch.float32, ()) for name, t in (("threshold", c.threshold), ("floor", c.floor))}
    expected |= {"down_bias": (c.down_bias, c.x.dtype, (d_model,))}
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            wanted = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
            raise LTEError(f"{name} is {words(tensor)}; expected {wanted}")
    return c


def definition(*args: object) -> Tensor:
    """What the op computes, in plain PyTorch."""
    c = checked(args)
    logits = proxy_reference.scores(*c.deciding)
    y = tiers_reference.tiered_ffn(c.x.float(), logits, c.threshold, c.floor, c.planes, c.deciding.activation)
    return (y if c.down_bias is None else y + c.down_bias.float()).to(c.x.dtype)


def _tiers(x: Tensor, logits: Tensor, threshold: Tensor, floor: Tensor, *args: object) -> Tensor:
    *tensors, biases, activation = cast(Args, args)
    return tiers_reference.tiered_ffn(x.float(), logits, threshold, floor, planes_of(tensors, biases), activation)


def _register() -> None:
    for name in ("tiered_ffn", "_tiered_ffn_no_grad"):
        _library.define(f"{name}{_ARGUMENTS}", tags=(torch.Tag.pt2_compliant_tag,))
        op = getattr(torch.ops.ltepass, name).default
        _library.impl(name, any_device(op, definition), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ltepass::{name}", lambda *args: torch.empty_like(checked(args).x), lib=_library)
        torch.library.register_vmap(f"ltepass::{name}", vmap_over_x(op), lib=_library)
    public, instead = torch.ops.ltepass.tiered_ffn.default, "ltepass.unlower(model)"
    rule = dispatch.rule(public, dispatch.no_gradient(public, instead), instead)
    _library.impl("tiered_ffn", rule, "Autograd", with_keyset=True)
    _library.impl("_tiered_ffn_no_grad", torch.library.fallthrough_kernel, "Autograd")
    # One op in Dynamo's graph, so that a pass finds it without guessing; plain ATen ops for autograd and inductor.
    _library.define(f"tiers{_GIVEN}")
    _library.impl("tiers", _tiers, "CompositeImplicitAutograd")


_register()
tiers = torch.ops.ltepass.tiers.default
tiered_ffn = dispatch.without_a_frame("tiered_ffn")
