"""The little of torchao that ltepass calls, where it is not installed: codes, scales and names are torchao's own.

With torchao installed the same tests run on that (`pip install torchao`, in an environment of its own).
"""

from __future__ import annotations

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


class Int8Tensor(Tensor):
    """codes int8 [d_out, d_in], scale fp32 [d_out, 1]; a product with it is one with codes * scale."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @staticmethod
    def __new__(
        cls: Any, qdata: Tensor, scale: Tensor, block_size: list[int], dtype: torch.dtype, zero_point: Any = None
    ) -> Int8Tensor:
        self: Int8Tensor = Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype, device=qdata.device)
        self.qdata, self.scale, self.zero_point = qdata, scale, zero_point
        return self

    def dequantize(self) -> Tensor:
        return self.qdata.to(self.dtype) * self.scale.to(self.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Int8Tensor, (self.qdata, self.scale, [1], self.dtype, self.zero_point)

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
            made = (None if t is None else func(t, *rest, **kwargs) for t in (self.qdata, self.scale, self.zero_point))
            qdata, scale, zero_point = made
            return Int8Tensor(qdata, scale, [1], dtype, zero_point)  # type: ignore[arg-type]
        plain = tree_map(lambda t: t.dequantize() if isinstance(t, Int8Tensor) else t, (args, kwargs))
        return func(*plain[0], **plain[1])


@dataclass
class Int8WeightOnlyConfig:
    version: int = 2
    set_inductor_config: bool = True


def quantize_(model: nn.Module, config: Any, filter_fn: Callable[[nn.Module, str], bool]) -> None:
    """Symmetric, round to nearest, as torchao does."""
    assert isinstance(config, Int8WeightOnlyConfig)
    for path, module in model.named_modules():
        if filter_fn(module, path):
            weight = module.get_parameter("weight").detach()
            scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
            codes = (weight / scale).round().clamp(-128, 127).to(torch.int8)
            made = Int8Tensor(codes, scale, [1], weight.dtype, torch.zeros_like(scale, dtype=torch.int8))
            module.weight = nn.Parameter(made, requires_grad=False)


def flatten_tensor_state_dict(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    flat = dict[str, Tensor]()
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        parts: Iterable[str] = PARTS if isinstance(tensor, Int8Tensor) else ()
        flat |= {f"{path}._{last}_{part}": getattr(tensor, part) for part in parts} or {name: tensor}
    return flat, {"tensor_names": json.dumps(list(state))}


def config_to_dict(config: Any) -> dict[str, Any]:
    return {"_type": type(config).__name__, "_version": config.version, "_data": {}}


def put_in_place(patch: pytest.MonkeyPatch) -> None:
    """Nothing to do where torchao itself is installed. Modules alone, without their package: others look for that."""
    if importlib.util.find_spec("torchao") is not None:
        return
    held: dict[str, tuple[Any, ...]] = {
        "quantization": (Int8Tensor, Int8WeightOnlyConfig, quantize_),
        "core.config": (config_to_dict,),
        "prototype.safetensors.safetensors_support": (flatten_tensor_state_dict,),
    }
    for name, things in held.items():
        module = ModuleType(f"torchao.{name}")
        vars(module).update({thing.__name__: thing for thing in things})
        patch.setitem(sys.modules, module.__name__, module)
