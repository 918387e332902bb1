"""What the routed ops take: schema and checks. They differ in what decides, and in how weights are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import proxy, proxy_reference, reference, routed_codes_reference
from ltepass.kernels.dispatch import Args
from ltepass.kernels.linear import FLOATS, words
from ltepass.kernels.routed_codes_reference import CodedLinear
from ltepass.kernels.weight_formats import BLOCK, SparseFormat


class Call(NamedTuple):
    """An op's arguments by what they are for.

    weights: up, up_bias, gate, gate_bias, down, down_bias; behind those in codes up_scale, gate_scale, down_scale.
    """

    x: Tensor
    router: Args
    threshold: Tensor
    weights: Args
    activation: str
    cut: Tensor | None
    input_cut: Tensor | None

    def coded_linears(self) -> tuple[CodedLinear, CodedLinear | None, CodedLinear]:
        """up, gate and down."""
        up, up_bias, gate, gate_bias, down, down_bias, up_scale, gate_scale, down_scale = self.weights
        gated = None if gate is None else CodedLinear(gate, gate_scale, gate_bias)
        return CodedLinear(up, up_scale, up_bias), gated, CodedLinear(down, down_scale, down_bias)


@dataclass(frozen=True)
class RoutedOp:
    """One of the six. router: what decides, as a schema; plain: the name of what C++ calls for other dtypes; format: of
    weights in codes.
    """

    name: str
    router: str
    n_router: int
    plain: str
    format: SparseFormat | None = None

    @property
    def arguments(self) -> str:
        return (
            f"(Tensor x, {self.router}, Tensor threshold, Tensor up, Tensor? up_bias, Tensor? gate, Tensor? gate_bias, "
            f"Tensor down, Tensor? down_bias, {'' if self.format is None else SCALES}"
            "str activation, Tensor? cut=None, Tensor? input_cut=None)"
        )

    @property
    def proxied(self) -> bool:
        return self.router is proxy.ROUTER

    @property
    def n_tensors(self) -> int:
        """Every argument before the activation; after it, `cut` and `input_cut` where they are given."""
        return self.n_router + 8 + 3 * (self.format is not None)

    def call(self, args: Args) -> Call:
        n = 1 + self.n_router
        cut, input_cut = (*args[self.n_tensors + 1 :], None, None)[:2]
        return Call(args[0], args[1:n], args[n], args[n + 1 : self.n_tensors], args[self.n_tensors], cut, input_cut)

    def checked(self, args: Args) -> Call:
        """Raises LTEError for shapes and dtypes that no path can make sense of."""
        c = self.call(args)
        up, _, gate, _, down, _, *scales = c.weights
        if self.format is not None:
            _check_weights_in_codes(self.format, c.x, up, gate, down, *scales)
        if not self.proxied:
            _check_router(c.x, c.router[0], c.activation)
            if self.format is not None:
                _check_int8("router", *c.router[:2])
                if c.x.shape[-1] > routed_codes_reference.MOST_INPUTS:
                    raise LTEError(f"d_model is {c.x.shape[-1]}; expected at most {routed_codes_reference.MOST_INPUTS}")
            _check_neurons(c.x, up, gate, down, c.router[0].shape[0], self.format)
            return c
        proxy.checked((c.x, *c.router, c.activation))
        _check_neurons(c.x, up, gate, down, self.n_experts(c), self.format)
        codes = c.router[0]
        if codes.shape[:2] != (1 if gate is None else 2, up.shape[0]):
            raise LTEError(f"codes are {list(codes.shape)} and up is {list(up.shape)}; expected codes of this FFN")
        return c

    def n_experts(self, c: Call) -> int:
        weight = c.router[-2]
        return weight.shape[0]  # type: ignore[no-any-return]

    def d_out(self, c: Call) -> int:
        down = c.weights[4]
        return 2 * down.shape[1] if self.format == "int4" else down.shape[0]  # type: ignore[no-any-return]

    def mask(self, c: Call) -> Tensor:
        """bool [..., n_experts]: the definition of the decision."""
        if self.proxied:
            return proxy_reference.scores(*proxy.call((c.x, *c.router, c.activation))) > c.threshold
        if self.format is not None:
            return routed_codes_reference.scores(c.x, CodedLinear(*c.router)) > c.threshold
        return reference.mask(*[c.x, *c.router, c.threshold])

    def masked_ffn(self, c: Call, active: Tensor) -> Tensor:
        """y, with the decision given."""
        seen = reference.leave_out_small(c.x, c.input_cut)
        if self.format is not None:
            return routed_codes_reference.masked_ffn(seen, active, *c.coded_linears(), c.activation, c.cut)
        return reference.masked_ffn(*[seen, active, *c.weights, c.activation, c.cut])


_ROUTER = "Tensor router_weight, Tensor? router_bias"
_INT8_ROUTER = "Tensor router_codes, Tensor router_scale, Tensor? router_bias"
SCALES = "Tensor up_scale, Tensor? gate_scale, Tensor down_scale, "
LINEAR = RoutedOp("routed_ffn", _ROUTER, 2, "_plain")
PROXY = RoutedOp("routed_proxy_ffn", proxy.ROUTER, proxy.N_ROUTER, "_plain_proxy")
LINEAR_INT8 = replace(LINEAR, name="routed_ffn_int8", router=_INT8_ROUTER, n_router=3, format="int8")
PROXY_INT8 = replace(PROXY, name="routed_proxy_ffn_int8", format="int8")
LINEAR_INT4 = replace(LINEAR_INT8, name="routed_ffn_int4", format="int4")
PROXY_INT4 = replace(PROXY, name="routed_proxy_ffn_int4", format="int4")
IN_CODES = (LINEAR_INT8, PROXY_INT8, LINEAR_INT4, PROXY_INT4)
OPS = (LINEAR, PROXY, *IN_CODES)


def op_in_codes(format: SparseFormat, *, proxied: bool) -> RoutedOp:
    """The op that reads an FFN of this format."""
    return next(op for op in IN_CODES if (op.format, op.proxied) == (format, proxied))


def check(x: Tensor, router_weight: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str) -> None:
    """Shapes and dtypes of floats that no path can make sense of; the C++ kernel makes the same checks itself."""
    _check_router(x, router_weight, activation)
    _check_neurons(x, up, gate, down, router_weight.shape[0], None)


def _check_router(x: Tensor, router_weight: Tensor, activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise LTEError(f"activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    if router_weight.shape[1] != x.shape[-1]:
        raise LTEError(
            f"x is [..., {x.shape[-1]}] and router_weight {list(router_weight.shape)}; expected [n_experts, d_model]"
        )


def _check_weights_in_codes(
    format: SparseFormat,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_scale: Tensor,
    gate_scale: Tensor | None,
    down_scale: Tensor,
) -> None:
    """Raises LTEError where codes and scales are none that a routed op of this format takes."""
    if x.dtype not in FLOATS:
        raise LTEError(f"x is {words(x)}; expected float32, bfloat16 or float16")
    if (gate is None) != (gate_scale is None):
        raise LTEError("one of gate and gate_scale is None; expected both or neither")
    for name, codes, scale in (("up", up, up_scale), ("gate", gate, gate_scale), ("down", down, down_scale)):
        if codes is not None and scale is not None:
            (_check_int8 if format == "int8" else _check_int4)(name, codes, scale)


def _check_int8(name: str, codes: Tensor, scale: Tensor) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise LTEError(f"{name} is {words(codes)}; expected a matrix of int8")
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        raise LTEError(f"{name}_scale is {words(scale)}; expected float32 [{codes.shape[0]}], one an output")


def _check_int4(name: str, codes: Tensor, scale: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise LTEError(f"{name} is {words(codes)}; expected a matrix of uint8, two codes a byte")
    rows, length = codes.shape[0], 2 * codes.shape[1]
    if length % BLOCK:
        raise LTEError(f"{name} is {words(codes)}, rows of {length} codes; expected a multiple of {BLOCK}")
    if scale.dtype != torch.float16 or scale.shape != (rows, length // BLOCK):
        raise LTEError(
            f"{name}_scale is {words(scale)}; expected float16 [{rows}, {length // BLOCK}], one a block of {BLOCK}"
        )


def _check_neurons(
    x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, n_experts: int, format: SparseFormat | None
) -> None:
    """Raises LTEError where a routed op's weights are not of one FFN."""
    d_model, d_ff = x.shape[-1], up.shape[0]
    in_4_bits = format == "int4"
    if up.shape[1] * (1 + in_4_bits) != d_model or down.shape[0 if in_4_bits else 1] != d_ff:
        expected = "[d_ff, d_model / 2] and [d_ff, d_out / 2]" if in_4_bits else "[d_ff, d_model] and [d_out, d_ff]"
        raise LTEError(f"x is [..., {d_model}], up {list(up.shape)}, down {list(down.shape)}; expected {expected}")
    if gate is not None and gate.shape != up.shape:
        raise LTEError(f"gate is {list(gate.shape)} and up is {list(up.shape)}; expected equal shapes")
    if n_experts == 0 or d_ff % n_experts != 0:
        raise LTEError(f"d_ff is {d_ff} and there are {n_experts} experts; expected a whole number of neurons each")
