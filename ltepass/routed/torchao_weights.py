"""Weights that torchao holds as int8 codes with a scale an output (its Int8Tensor). torchao is imported to make them,
and not to read them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

from ltepass.errors import ConfigError
from ltepass.routed.sites import FFNSite

Int8Weight = tuple[Tensor, Tensor]
"""codes int8 [d_out, d_in], and their scale fp32 [d_out]"""


def torchao(module: str) -> ModuleType:
    """A module of torchao's. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise ConfigError(f"int8 weights need torchao ({error}); pip install 'ltepass[quantize]'") from error


def holds_int8(weight: Tensor) -> bool:
    """Whether it is torchao's Int8Tensor, which is not imported for it."""
    return type(weight).__name__ == "Int8Tensor"


def is_quantised(model: nn.Module) -> bool:
    """Whether torchao holds any of its weights in int8."""
    return any(holds_int8(parameter) for parameter in model.parameters())


def ffn_is_quantised(model: nn.Module, site: FFNSite) -> bool:
    """Whether torchao holds all of an FFN's weights in int8."""
    held = dict(model.named_parameters(remove_duplicate=False))
    names = {rows.param for rows in (site.up_rows, site.gate_rows, site.down_rows) if rows}
    return all(name in held and holds_int8(held[name]) for name in names)


def int8_parts(weight: Tensor) -> Int8Weight:
    """Of torchao's Int8Tensor."""
    return weight.qdata, weight.scale.reshape(-1).float()  # type: ignore[attr-defined]


def int8_config() -> object:
    """How torchao is asked for them. version 2: Int8Tensor; the other flag would change inductor's settings for all."""
    return torchao("quantization").Int8WeightOnlyConfig(version=2, set_inductor_config=False)


def int8_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> nn.Parameter:
    """torchao's Int8Tensor of these. codes: int8 [d_out, d_in]; scale: fp32 [d_out, 1]; zero_point: int8 [d_out, 1] of
    zeros; dtype: that the weight passes for. Raises ConfigError.
    """
    made = torchao("quantization").Int8Tensor(codes, scale, [1, codes.shape[1]], dtype, zero_point=zero_point)
    return nn.Parameter(made, requires_grad=False)
