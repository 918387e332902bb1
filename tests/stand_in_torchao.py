"""The little of torchao that ltepass calls, where it is not installed: codes, scales and names are torchao's own.

With torchao installed the same tests run on that (`pip install torchao`, in an environment of its own).
"""

from __future__ import annotations

import enum
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

PARTS = ("qdata", "scale", "zero_point")


class Coded(Tensor):
    """codes int8 [d_out, d_in] and their scale; a product with it is one with what they stand for."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @classmethod
    def of(cls: Any, qdata: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Any:
        self = Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype, device=qdata.device)
        self.qdata, self.scale, self.zero_point = qdata, scale, zero_point
        return self

    def dequantize(self) -> Tensor:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self).of, (self.qdata, self.scale, self.zero_point, self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.dequantize(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        (self, *rest), kwargs = args, kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            dtype = kwargs.pop("dtype", None) or self.dtype
            parts = (None if t is None else func(t, *rest, **kwargs) for t in (self.qdata, self.scale, self.zero_point))
            return type(self).of(*parts, dtype)
        plain = tree_map(lambda t: t.dequantize() if isinstance(t, Coded) else t, (args, kwargs))
        return func(*plain[0], **plain[1])


class Int8Tensor(Coded):
    """scale fp32 [d_out, 1]"""

    @staticmethod
    def __new__(
        cls: Any, qdata: Tensor, scale: Tensor, block_size: list[int], dtype: torch.dtype, zero_point: Any = None
    ) -> Any:
        return cls.of(qdata, scale, zero_point, dtype)

    def dequantize(self) -> Tensor:
        return self.qdata.to(self.dtype) * self.scale.to(self.dtype)


class IntxUnpackedToInt8Tensor(Coded):
    """scale fp16 [d_out, d_in / 32], or [d_out / 32, d_in]"""

    @staticmethod
    def __new__(
        cls: Any,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        target_dtype: torch.dtype,
        block_size: tuple[int, int],
        dtype: torch.dtype,
        activation_quantization: None,
    ) -> Any:
        assert scale.shape == (qdata.shape[0] // block_size[0], qdata.shape[1] // block_size[1])
        return cls.of(qdata, scale, zero_point, dtype)

    def dequantize(self) -> Tensor:
        scale: Tensor = self.scale
        for dim in (0, 1):
            scale = scale.repeat_interleave(self.shape[dim] // scale.shape[dim], dim)
        return (self.qdata.to(self.dtype) * scale).to(self.dtype)


@dataclass
class Int8WeightOnlyConfig:
    version: int = 2
    set_inductor_config: bool = True


@dataclass
class PerGroup:
    group_size: int


class IntxChooseQParamsAlgorithm(enum.Enum):
    HQQ_SCALE_ONLY = "hqq_scale_only"


@dataclass
class IntxWeightOnlyConfig:
    weight_dtype: torch.dtype
    granularity: PerGroup
    scale_dtype: torch.dtype
    intx_choose_qparams_algorithm: IntxChooseQParamsAlgorithm
    version: int = 2


def quantize_(model: nn.Module, config: Any, filter_fn: Callable[[nn.Module, str], bool]) -> None:
    """Symmetric, round to nearest, as torchao does; of 4 bits by the largest weight, where torchao looks for better."""
    for path, module in model.named_modules():
        if filter_fn(module, path):
            weight = module.get_parameter("weight").detach()
            made = _int8(weight) if isinstance(config, Int8WeightOnlyConfig) else _int4(weight)
            module.weight = nn.Parameter(made, requires_grad=False)


def _int8(weight: Tensor) -> Any:
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
    codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return Int8Tensor(codes, scale, [1], weight.dtype, torch.zeros_like(scale, dtype=torch.int8))


def _int4(weight: Tensor) -> Any:
    blocks = weight.unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(2) / 7.5).half()
    codes = (blocks / scale.float().clamp(min=1e-6)[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    return IntxUnpackedToInt8Tensor(codes, scale, zeros, torch.int8, (1, 32), weight.dtype, None)


def flatten_tensor_state_dict(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    flat = dict[str, Tensor]()
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        parts: Iterable[str] = PARTS if isinstance(tensor, Coded) else ()
        flat |= {f"{path}._{last}_{part}": getattr(tensor, part) for part in parts} or {name: tensor}
    return flat, {"tensor_names": json.dumps(list(state))}


def config_to_dict(config: Any) -> dict[str, Any]:
    return {"_type": type(config).__name__, "_version": config.version, "_data": {}}


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Nothing to do where torchao itself is installed. Modules alone, without their package: others look for that."""
    if importlib.util.find_spec("torchao") is not None:
        return
    held: dict[str, tuple[Any, ...]] = {
        "quantization": (
            *(Int8Tensor, Int8WeightOnlyConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, PerGroup),
            quantize_,
        ),
        "quantization.quant_api": (IntxChooseQParamsAlgorithm,),
        "core.config": (config_to_dict,),
        "prototype.safetensors.safetensors_support": (flatten_tensor_state_dict,),
    }
    for name, things in held.items():
        module = ModuleType(f"torchao.{name}")
        vars(module).update({thing.__name__: thing for thing in things})
        patch.setitem(sys.modules, module.__name__, module)
