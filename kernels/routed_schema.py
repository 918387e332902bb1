"""What the routed ops take: schema and checks. They differ in what decides, and in how weights are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import proxy, proxy_reference, reference, routed_int8_reference
from ltepass.kernels.dispatch import Args
from ltepass.kernels.linear import FLOATS, words
from ltepass.kernels.routed_int8_reference import Int8Linear


class Call(NamedTuple):
    """An op's arguments by what they are for.

    weights: up, up_bias, gate, gate_bias, down, down_bias; of int8 ones up_scale, gate_scale, down_scale behind them.
    """

    x: Tensor
    router: Args
    threshold: Tensor
    weights: Args
    activation: str
    cut: Tensor | None
    input_cut: Tensor | None

    def int8_linears(self) -> tuple[Int8Linear, Int8Linear | None, Int8Linear]:
        """up, gate and down."""
        up, up_bias, gate, gate_bias, down, down_bias, up_scale, gate_scale, down_scale = self.weights
        gated = None if gate is None else Int8Linear(gate, gate_scale, gate_bias)
        return Int8Linear(up, up_scale, up_bias), gated, Int8Linear(down, down_scale, down_bias)


@dataclass(frozen=True)
class RoutedOp:
    """One of the four. router: what decides, as a schema; plain: the name of what C++ calls for other dtypes."""

    name: str
    router: str
    n_router: int
    plain: str
    int8: bool = False

    @property
    def arguments(self) -> str:
        return (
            f"(Tensor x, {self.router}, Tensor threshold, Tensor up, Tensor? up_bias, Tensor? gate, Tensor? gate_bias, "
            f"Tensor down, Tensor? down_bias, {SCALES if self.int8 else ''}"
            "str activation, Tensor? cut=None, Tensor? input_cut=None)"
        )

    @property
    def proxied(self) -> bool:
        return self.router is proxy.ROUTER

    @property
    def n_tensors(self) -> int:
        """Every argument before the activation; after it, `cut` and `input_cut` where they are given."""
        return self.n_router + 8 + 3 * self.int8

    def call(self, args: Args) -> Call:
        n = 1 + self.n_router
        cut, input_cut = (*args[self.n_tensors + 1 :], None, None)[:2]
        return Call(args[0], args[1:n], args[n], args[n + 1 : self.n_tensors], args[self.n_tensors], cut, input_cut)

    def checked(self, args: Args) -> Call:
        """Raises LTEError for shapes and dtypes that no path can make sense of."""
        c = self.call(args)
        up, _, gate, _, down, _, *scales = c.weights
        if self.int8:
            _check_int8(c.x, up, gate, down, *scales)
        if not self.proxied:
            check(c.x, c.router[0], up, gate, down, c.activation)
            if self.int8:
                _check_codes("router", *c.router[:2])
                if c.x.shape[-1] > routed_int8_reference.MOST_INPUTS:
                    raise LTEError(f"d_model is {c.x.shape[-1]}; expected at most {routed_int8_reference.MOST_INPUTS}")
            return c
        proxy.checked((c.x, *c.router, c.activation))
        _check_neurons(c.x, up, gate, down, self.n_experts(c))
        codes = c.router[0]
        if codes.shape[:2] != (1 if gate is None else 2, up.shape[0]):
            raise LTEError(f"codes are {list(codes.shape)} and up is {list(up.shape)}; expected codes of this FFN")
        return c

    def n_experts(self, c: Call) -> int:
        weight = c.router[-2]
        return weight.shape[0]  # type: ignore[no-any-return]

    def mask(self, c: Call) -> Tensor:
        """bool [..., n_experts]: the definition of the decision."""
        if self.proxied:
            return proxy_reference.scores(*proxy.call((c.x, *c.router, c.activation))) > c.threshold
        if self.int8:
            return routed_int8_reference.scores(c.x, Int8Linear(*c.router)) > c.threshold
        return reference.mask(*[c.x, *c.router, c.threshold])

    def masked_ffn(self, c: Call, active: Tensor) -> Tensor:
        """y, with the decision given."""
        seen = reference.leave_out_small(c.x, c.input_cut)
        if self.int8:
            return routed_int8_reference.masked_ffn(seen, active, *c.int8_linears(), c.activation, c.cut)
        return reference.masked_ffn(*[seen, active, *c.weights, c.activation, c.cut])


_ROUTER = "Tensor router_weight, Tensor? router_bias"
_INT8_ROUTER = "Tensor router_codes, Tensor router_scale, Tensor? router_bias"
SCALES = "Tensor up_scale, Tensor? gate_scale, Tensor down_scale, "
LINEAR = RoutedOp("routed_ffn", _ROUTER, 2, "_plain")
PROXY = RoutedOp("routed_proxy_ffn", proxy.ROUTER, proxy.N_ROUTER, "_plain_proxy")
LINEAR_INT8 = replace(LINEAR, name="routed_ffn_int8", router=_INT8_ROUTER, n_router=3, int8=True)
PROXY_INT8 = replace(PROXY, name="routed_proxy_ffn_int8", int8=True)
OPS = (LINEAR, PROXY, LINEAR_INT8, PROXY_INT8)


def check(x: Tensor, router_weight: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str) -> None:
    """Shapes and dtypes that no path can make sense of; the C++ kernel makes the same checks itself."""
    if activation not in reference.ACTIVATIONS:
        raise LTEError(f"activation is {activation!r}; expected one of {', '.join(reference.ACTIVATIONS)}")
    if router_weight.shape[1] != x.shape[-1]:
        raise LTEError(
            f"x is [..., {x.shape[-1]}] and router_weight {list(router_weight.shape)}; expected [n_experts, d_model]"
        )
    _check_neurons(x, up, gate, down, router_weight.shape[0])


def _check_int8(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    up_scale: Tensor,
    gate_scale: Tensor | None,
    down_scale: Tensor,
) -> None:
    """Raises LTEError where codes and scales are none that a routed op with int8 weights takes."""
    if x.dtype not in FLOATS:
        raise LTEError(f"x is {words(x)}; expected float32, bfloat16 or float16")
    if (gate is None) != (gate_scale is None):
        raise LTEError("one of gate and gate_scale is None; expected both or neither")
    for name, codes, scale in (("up", up, up_scale), ("gate", gate, gate_scale), ("down", down, down_scale)):
        if codes is not None and scale is not None:
            _check_codes(name, codes, scale)


def _check_codes(name: str, codes: Tensor, scale: Tensor) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise LTEError(f"{name} is {words(codes)}; expected a matrix of int8")
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        raise LTEError(f"{name}_scale is {words(scale)}; expected float32 [{codes.shape[0]}], one an output")


def _check_neurons(x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, n_experts: int) -> None:
    """Raises LTEError where a routed op's weights are not of one FFN."""
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
