"""Weights that torchao holds as codes: int8 with a scale an output (its Int8Tensor), and 4 bits in blocks of 32 along
d_in, a byte a code (its IntxUnpackedToInt8Tensor). A down projection that is gathered by neurons has its blocks along
d_out, so that an input's codes and scales belong together. torchao is imported to make them, and not to read them.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

from ltepass.errors import ConfigError
from ltepass.kernels.weight_formats import (
    BLOCK,
    Parts,
    SparseFormat,
    dequantise_int4,
    dequantise_int8,
    lies_by_input,
    pack_int4,
)
from ltepass.routed.sites import FFNSite, NeuronRows

Coded = tuple[Tensor, Tensor]
"""codes int8 [d_out, d_in] and their scale fp32 [d_out], or what `int4_parts` gives"""
_INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 -- torch's stubs do not name it


def torchao(module: str) -> ModuleType:
    """A module of torchao's. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(f"torchao.{module}")
    except ImportError as error:
        raise ConfigError(f"weights in codes need torchao ({error}); pip install 'ltepass[quantize]'") from error


def holds_int8(weight: Tensor) -> bool:
    """Whether it is torchao's Int8Tensor, which is not imported for it."""
    return type(weight).__name__ == "Int8Tensor"


def holds_int4(weight: Tensor) -> bool:
    """Whether it is torchao's tensor of few bits; `why_not_weight` says whether they are four, in blocks of 32."""
    return type(weight).__name__ == "IntxUnpackedToInt8Tensor"


def holds_codes(weight: Tensor) -> bool:
    return holds_int8(weight) or holds_int4(weight)


def is_quantised(model: nn.Module) -> bool:
    """Whether torchao holds any of its weights as codes."""
    return any(holds_codes(parameter) for parameter in model.parameters())


def weights_of(model: nn.Module) -> str | None:
    """The fewest bits that torchao holds any of its weights in, "int8" or "int4"; None where all are floats."""
    few = {holds_int4(parameter) for parameter in model.parameters() if holds_codes(parameter)}
    return None if not few else "int4" if True in few else "int8"


def ffn_format(model: nn.Module, site: FFNSite) -> SparseFormat | None:
    """The format in which torchao holds all of an FFN's weights, or None."""
    held = dict(model.named_parameters(remove_duplicate=False))
    weights = [held.get(rows.param) for rows in (site.up_rows, site.gate_rows, site.down_rows) if rows]
    if all(weight is not None and holds_int8(weight) for weight in weights):
        return "int8"
    return "int4" if all(weight is not None and holds_int4(weight) for weight in weights) else None


def int8_parts(weight: Tensor) -> Coded:
    """Of torchao's Int8Tensor."""
    return weight.qdata, weight.scale.reshape(-1).float()  # type: ignore[attr-defined]


def has_blocks_by_input(weight: Tensor) -> bool:
    """Whether a weight of 4 bits has a scale for each 32 outputs of an input."""
    d_out, d_in = weight.shape
    return tuple(weight.scale.shape) == (d_out // BLOCK, d_in)  # type: ignore[attr-defined]


def int4_parts_by_input(weight: Tensor) -> Coded:
    """Of one that has: codes uint8 [d_in, d_out / 2], packed, and their scale fp16 [d_in, d_out / 32]."""
    codes, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    return pack_int4((codes.t() + 8).to(torch.uint8)), scale.t().to(torch.float16).contiguous()


def int4_of_neurons(rows: NeuronRows, weight: Tensor, d_ff: int) -> Coded:
    """Codes and scales of a site's neurons, of a weight whose blocks lie along each, [d_ff, ...]; of a down projection
    whose blocks lie across neurons the whole of them.
    """
    if rows.dim == 0:
        codes, scale = int4_parts(weight)
    elif has_blocks_by_input(weight):
        codes, scale = int4_parts_by_input(weight)
    else:
        return int4_parts(weight)
    neurons = torch.tensor(rows.indices(d_ff), device=codes.device)
    return codes[neurons], scale[neurons]


def int4_parts(weight: Tensor) -> Coded:
    """Of torchao's tensor of 4 bits: codes packed, uint8 [d_out, d_in / 2], and their scale fp16 [d_out, d_in / 32]."""
    codes, scale = weight.qdata, weight.scale  # type: ignore[attr-defined]
    return pack_int4((codes + 8).to(torch.uint8)), scale.to(torch.float16)


def parts_of(weight: Tensor) -> Parts:
    """What the format's linear takes, or the sparse op alone."""
    if holds_int8(weight):
        return int8_parts(weight)
    return int4_parts_by_input(weight) if has_blocks_by_input(weight) else (*int4_parts(weight), None)


def floats_of(parts: Parts) -> Tensor:
    """[d_out, d_in] fp32 of what `parts_of` gives."""
    codes, scale = parts[:2]
    assert codes is not None, "of both formats"
    assert scale is not None, "of both formats"
    if lies_by_input(parts):
        return dequantise_int4(codes, scale, None).t()
    return dequantise_int8(codes, scale) if len(parts) == 2 else dequantise_int4(codes, scale, None)


def config_of(weights: str) -> object:
    """How torchao is asked for weights in "int8" or "int4"."""
    return int8_config() if weights == "int8" else _int4_config()


def int8_config() -> object:
    """How torchao is asked for them. version 2: Int8Tensor; the other flag would change inductor's settings for all."""
    return torchao("quantization").Int8WeightOnlyConfig(version=2, set_inductor_config=False)


def _int4_config() -> object:
    """Scales that lose least (HQQ), in the dtype that the op reads."""
    library = torchao("quantization")
    best = torchao("quantization.quant_api").IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    group, scale = library.PerGroup(BLOCK), torch.float16
    return library.IntxWeightOnlyConfig(
        weight_dtype=_INT4, granularity=group, scale_dtype=scale, intx_choose_qparams_algorithm=best
    )


def int4_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None) -> nn.Parameter:
    """torchao's tensor of these. codes: int8 [d_out, d_in] in [-8, 7]; scale: fp16 [d_out, d_in / 32], or [d_out / 32,
    d_in]; dtype: that the weight passes for; zero_point: int8 of the scale's shape, or zeros. Raises ConfigError.
    """
    blocks = (1, BLOCK) if len(scale) == len(codes) else (BLOCK, 1)
    zeros = torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point
    hold = torchao("quantization").IntxUnpackedToInt8Tensor
    return nn.Parameter(hold(codes, scale, zeros, _INT4, blocks, dtype, None), requires_grad=False)


def int8_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> nn.Parameter:
    """torchao's Int8Tensor of these. codes: int8 [d_out, d_in]; scale: fp32 [d_out, 1]; zero_point: int8 [d_out, 1] of
    zeros; dtype: that the weight passes for. Raises ConfigError.
    """
    made = torchao("quantization").Int8Tensor(codes, scale, [1, codes.shape[1]], dtype, zero_point=zero_point)
    return nn.Parameter(made, requires_grad=False)
