"""What a linear module of a lowered model calls: the op that reads its weight, or one for quantised weights.

Nothing traces these modules. Only the forward on the instance changes: hooks run, names and parameters stay, and
whatever the ops do not read goes to the linear's own forward. The weights are looked at anew in every call: they may be
moved, cast or replaced meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ltepass.kernels.linear import FLOATS, linear, linear_int4, linear_int8
from ltepass.kernels.weight_formats import BLOCK, Format, quantise, takes
from ltepass.passes.graph.edit import once_a_tensor
from ltepass.passes.lower.why_not_linear import is_conv1d, is_product, parameters_of, why_not_linear
from ltepass.routed.sites import is_ordinary
from ltepass.routed.source import Source
from ltepass.routed.torchao_weights import holds_int8, int4_parts, int8_parts
from ltepass.routed.undo import lay_as


class LinearCall:
    """Stands for the forward of `module`. An input or a weight that the op does not read goes to the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def own(self, x: Tensor) -> Tensor:
        return self.module.__class__.forward(self.module, x)  # type: ignore[no-any-return]

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, ...]:
        """What a call reads, but for the bias."""
        raise NotImplementedError


class FloatCall(LinearCall):
    """stride: of the weight before it was stored a row an output, or None."""

    def __init__(self, module: nn.Module, stride: tuple[int, ...] | None = None) -> None:
        super().__init__(module)
        self.stride = stride

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = parameters_of(self.module)
        if not _served(x) or type(weight) is not Parameter or weight.dtype != x.dtype or not weight.is_cpu:
            return self.own(x)
        return linear(x, weight if self.stride is None else weight.t(), bias)

    def weights(self) -> tuple[Tensor, ...]:
        return parameters_of(self.module)[:1]


class Int8Call(LinearCall):
    """Weights of 8 bits, a scale an output. Inputs become int8 in blocks of 32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.cls = type(module.weight)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = parameters_of(self.module)
        if not _served(x) or type(weight) is not self.cls or not weight.is_cpu:
            return self.own(x)
        codes, scale = int8_parts(weight)
        return linear_int8(x, codes, scale, None if bias is None else bias.to(x.dtype))

    def weights(self) -> tuple[Tensor, ...]:
        return int8_parts(parameters_of(self.module)[0])


class Int4Call(LinearCall):
    """The same for 4 bits in blocks of 32, packed once; `codes` are those that were packed."""

    def __init__(self, module: nn.Module, weight: Tensor) -> None:
        super().__init__(module)
        self.codes: Tensor = weight.qdata  # type: ignore[attr-defined]
        self.packed, self.scale = int4_parts(weight)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = parameters_of(self.module)
        if not _served(x) or getattr(weight, "qdata", None) is not self.codes:
            return self.own(x)
        return linear_int4(x, self.packed, self.scale, None, None if bias is None else bias.to(x.dtype))

    def weights(self) -> tuple[Tensor, ...]:
        return self.packed, self.scale


class QuantisedCall(LinearCall):
    """Weights in floats, whose codes were made when they were lowered. Another weight goes to the module itself."""

    def __init__(self, module: nn.Module, parts: tuple[Tensor | None, ...]) -> None:
        super().__init__(module)
        self.source, self.parts = Source(parameters_of(module)[0]), parts

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = parameters_of(self.module)
        if not _served(x) or not self.source.is_still(weight):
            return self.own(x)
        op = linear_int8 if len(self.parts) == 2 else linear_int4
        return op(x, *self.parts, None if bias is None else bias.to(x.dtype))

    def weights(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.parts if t is not None)


def _served(x: Tensor) -> bool:
    """Whether the ops take this input at all: autocast means another dtype."""
    return type(x) is Tensor and x.is_cpu and x.dtype in FLOATS and not torch.is_autocast_enabled("cpu")


def calls(model: nn.Module) -> Iterator[LinearCall]:
    """Of every linear that is lowered."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return (forward for forward in forwards if isinstance(forward, LinearCall))


def lower_linear_modules(
    model: nn.Module, bypassed: Iterable[nn.Module], *, quantised_only: bool = False, format: Format | None = None
) -> dict[str, str]:
    """Every plain linear on the CPU calls its op, but for those that a lowered FFN passes by (`bypassed`).

    quantised_only: for a model that is compiled, where the backend finds the others. format: what weights in floats are
    quantised to; None leaves them. Returns the paths of those that were left, and why.
    """
    skipped, left = set(bypassed), {}
    make = None if format is None else once_a_tensor(partial(quantise, format=format))
    for path, module in model.named_modules():
        if module in skipped or not is_product(module) or not parameters_of(module)[0].is_cpu:
            continue
        reason = why_not_linear(module)
        if reason is not None:
            left[path] = reason
        elif not (quantised_only and is_ordinary(parameters_of(module)[0])):
            rows = _rows(module)
            if make is not None and is_ordinary(rows) and not takes(format, rows.shape[1]):
                left[path] = f"d_in is no multiple of {BLOCK}"
            elif make is not None and is_ordinary(rows):
                module.forward = QuantisedCall(module, make(rows))
            else:
                module.forward = _call(module)
    return left


def _rows(module: nn.Module) -> Tensor:
    """The weight, a row an output."""
    weight, _ = parameters_of(module)
    return weight.detach().t() if is_conv1d(module) else weight.detach() if is_ordinary(weight) else weight


def _call(module: nn.Module) -> LinearCall:
    """The call that a linear module's weight asks for."""
    weight, _ = parameters_of(module)
    if not is_ordinary(weight):
        return Int8Call(module) if holds_int8(weight) else Int4Call(module, weight)
    if not is_conv1d(module):
        return FloatCall(module)
    stride = weight.stride()
    weight.data = weight.data.t().contiguous().t()
    return FloatCall(module, stride)


def lowered_linears(model: nn.Module) -> int:
    return sum(1 for _ in calls(model))


def weights_read(model: nn.Module) -> dict[nn.Parameter, tuple[Tensor, ...]]:
    """What calls of lowered linears read in the place of a parameter."""
    return {call.module.weight: call.weights() for call in calls(model)}  # type: ignore[misc]


def unlower_linear_modules(model: nn.Module) -> None:
    """Every linear module calls its own forward again, on a weight that lies as it did."""
    for call in list(calls(model)):
        del call.module.__dict__["forward"]
        weight, _ = parameters_of(call.module)
        if isinstance(call, FloatCall) and call.stride is not None and weight.t().is_contiguous():
            lay_as(weight, call.stride)
