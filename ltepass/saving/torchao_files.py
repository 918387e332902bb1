"""Weights in codes in safetensors, under the names that torchao and transformers give them there.

    X.weight, an Int8Tensor [d_out, d_in]   ->   X._weight_qdata      I8  [d_out, d_in]
                                                 X._weight_scale      F32 [d_out, 1]
                                                 X._weight_zero_point I8  [d_out, 1], zeros; may be missing
    X.weight, 4 bits in blocks of 32        ->   X._weight_qdata      I8  [d_out, d_in], a code a byte
                                                 X._weight_scale      F16 [d_out, d_in / 32]
                                                 X._weight_zero_point I8  [d_out, d_in / 32], zeros; may be missing
    the same of a gated FFN's down          ->   scale and zero point [d_out / 32, d_in]

So transformers loads the folder without ltepass too, dense, where torchao is installed. What torchao wrote about each
tensor into the file's metadata is not read here: names, dtypes and shapes say it all, and are compared with the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ltepass.errors import CheckpointError, ConfigError, shown
from ltepass.kernels.weight_formats import BLOCK
from ltepass.passes.lower.why_not_linear import why_not_held
from ltepass.paths import is_path
from ltepass.routed.torchao_weights import holds_codes, holds_int4, int4_weight, int8_weight, torchao

Header = dict[str, tuple[str, tuple[int, ...]]]
PARTS = ("qdata", "scale", "zero_point")
_AGAIN = "expected a directory written by save_pretrained of a model that ltepass.quantize changed; save it again"


def flat(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict as safetensors can hold it, and what torchao says of each tensor. Raises CheckpointError."""
    tensors, metadata = torchao("prototype.safetensors.safetensors_support").flatten_tensor_state_dict(state)
    for name, weight in state.items():
        if holds_int4(weight):
            reason = why_not_held(weight)
            if reason is not None:
                raise CheckpointError(f"{name} cannot be saved: {reason}")
            scale = f"{name.rpartition('.')[0]}._weight_scale"
            tensors[scale] = tensors[scale].to(torch.float16)  # as it was made, whatever the model's dtype became
    return tensors, metadata


def whole(header: Header) -> tuple[Header, tuple[str, ...]]:
    """The header with each weight in codes under its one name, as if it lay there in fp32; and these names.

    Raises CheckpointError where parts are missing, do not fit each other, or a weight is there twice.
    """
    found: dict[str, Header] = {}
    rest: Header = {}
    for name, info in header.items():
        path, _, last = name.rpartition(".")
        part = last.removeprefix("_weight_")
        if last.startswith("_weight_") and part in PARTS:
            found.setdefault(f"{path}.weight", {})[part] = info
        else:
            rest[name] = info
    for name, parts in found.items():
        shape = parts.get("qdata", ("", ()))[1]
        if len(shape) != 2 or not is_path(name) or name in rest:
            raise CheckpointError(f"{shown(name)} in the weight files is no matrix in codes; {_AGAIN}")
        for part, wanted in _expected(parts, shape).items():
            if parts.get(part, wanted if part == "zero_point" else None) != wanted:
                raise CheckpointError(
                    f"the {part} of {name} in the weight files is {parts.get(part, 'missing')}; expected {wanted}; "
                    f"{_AGAIN}"
                )
        rest[name] = ("F32", shape)
    return rest, tuple(found)


def _expected(parts: Header, shape: tuple[int, ...]) -> Header:
    """The parts of a weight of this shape. The dtype of its scales says which format it is in."""
    d_out, d_in = shape
    scale = parts.get("scale", ("", ()))
    by_input = scale == ("F16", (d_out // BLOCK, d_in)) and d_out % BLOCK == 0
    of_four_bits = by_input or (scale[0] == "F16" and d_in % BLOCK == 0)
    scales = (d_out // BLOCK, d_in) if by_input else (d_out, d_in // BLOCK if of_four_bits else 1)
    return {"qdata": ("I8", shape), "scale": ("F16" if of_four_bits else "F32", scales), "zero_point": ("I8", scales)}


def check_linears(model: nn.Module, packed: Header) -> None:
    """Weights in codes that the model has by name are those of its linears, in their shapes, and torchao is there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, (_, shape) in packed.items():
        module = modules.get(name.rpartition(".")[0])
        if name in names and (not isinstance(module, nn.Linear) or tuple(module.weight.shape) != shape):
            raise CheckpointError(
                f"the weight files hold {shown(name)} in codes, {list(shape)}, and this {type(model).__name__} has no "
                f"such linear; {_AGAIN}"
            )
    if packed:
        require_torchao()


def require_torchao() -> None:
    """Raises CheckpointError where the library that holds weights in codes is not installed."""
    try:
        torchao("quantization")
    except ConfigError as error:
        raise CheckpointError(f"the weight files hold weights in codes: {error}") from error


def check_codes(model: nn.Module) -> None:
    """Scales are numbers, zero points zero, and codes of 4 bits no more. Raises CheckpointError."""
    for name, weight in model.named_parameters():
        if not holds_codes(weight) or weight.is_meta:
            continue
        scale, zero_point = weight.scale, weight.zero_point  # type: ignore[attr-defined]
        if not bool(scale.isfinite().all()):
            raise CheckpointError(f"a scale of {name} is not a number; {_AGAIN}")
        if zero_point is not None and bool(zero_point.any()):
            raise CheckpointError(f"a zero point of {name} is not 0, and its codes are symmetric; {_AGAIN}")
        if holds_int4(weight) and why_not_held(weight) is not None:
            raise CheckpointError(f"{name}: {why_not_held(weight)}; {_AGAIN}")


def joined(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Parameter:
    """The weight of this name out of a file's tensors, whose header was checked; its values are not yet."""
    stem = f"{name.rpartition('.')[0]}._weight_"
    codes, scale, zero_point = (tensors.get(stem + part) for part in PARTS)
    assert codes is not None, "the header was checked"
    assert scale is not None, "the header was checked"
    if scale.dtype == torch.float16:
        return int4_weight(codes, scale, dtype, zero_point)
    return int8_weight(codes, scale, zero_point, dtype)


class JoinParts(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """The parts of a weight, as transformers collects them, become one parameter."""

    def convert(
        self, input_dict: dict[str, list[Tensor]], *, full_layer_name: str, model: nn.Module, **_: object
    ) -> dict[str, nn.Parameter]:
        """full_layer_name: of the weight."""
        path = full_layer_name.rpartition(".")[0]
        parts = {f"{path}.{part}": tensors[0] for part, tensors in input_dict.items()}
        return {full_layer_name: joined(full_layer_name, parts, model.get_parameter(full_layer_name).dtype)}


def conversions() -> list[WeightConverter]:
    """What transformers is told of the parts."""
    return [WeightConverter([f"_weight_{part}" for part in PARTS], "weight", [JoinParts()])]


def is_ours(conversion: object) -> bool:
    """Whether it is one of `conversions`."""
    return any(isinstance(operation, JoinParts) for operation in getattr(conversion, "operations", ()))
