"""One call of the op as its kernels see it: x flattened, every kernel's arguments by name, and the way to launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels.gpu import tuning
from ltepass.kernels.gpu.tuning import Launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("x", "router_weight", "router_bias", "threshold", "up", "up_bias", "gate", "gate_bias", "down", "down_bias")

Launcher = Callable[[Any], Any]  # a kernel -> something that is subscripted with a grid and called
DOT = 16  # the smallest side of a tile on matrix units
MAX_SPLITS = 32  # parts of y that the last arriver adds: its loads are unrolled, so all of them are in flight at once


@dataclass(frozen=True, kw_only=True)
class Call:
    """The op's arguments, x as [T, d_model]; `leading` is what x's other axes were."""

    x: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    threshold: Tensor
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str
    cut: Tensor | None
    leading: tuple[int, ...]
    launcher: Launcher
    device: str
    traced: bool

    @staticmethod
    def of(args: tuple[Any, ...], launcher: Launcher, device: str | None = None) -> Call:
        """args: in the order of the op's schema. device: name to look tuned launches up by; that of x's GPU if None.

        The small operands are made contiguous (they are already, in any model); the three weights keep their strides.
        """
        given = dict(zip(NAMES, args[: len(NAMES)], strict=True))
        x = given.pop("x")
        if x.dtype not in DTYPES or given["up"].dtype != x.dtype:
            raise LTEError(
                f"x is {x.dtype} and the weights are {given['up'].dtype}; the GPU kernels expect float32, "
                "float16 or bfloat16 for both; cast the model or the input"
            )
        small = ("router_weight", "router_bias", "up_bias", "gate_bias", "down_bias")
        given.update({n: given[n].contiguous() for n in small if given[n] is not None})
        return Call(
            x=x.reshape(-1, x.shape[-1]).contiguous(),
            leading=tuple(x.shape[:-1]),
            launcher=launcher,
            traced=launcher is torch.library.wrap_triton,
            device=tuning.device_name(x.device) if device is None else device,
            activation=args[len(NAMES)],
            cut=args[len(NAMES) + 1] if len(args) > len(NAMES) + 1 else None,
            **given,
        )

    @property
    def n_tokens(self) -> int:
        return self.x.shape[0]

    @property
    def d_model(self) -> int:
        return self.x.shape[1]

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def d_out(self) -> int:
        return self.down.shape[0]

    @property
    def n_experts(self) -> int:
        return self.router_weight.shape[0]

    @property
    def group_size(self) -> int:
        return self.d_ff // self.n_experts

    def router_args(self) -> dict[str, Any]:
        """A pointer that a kernel will not read is x, because a tracer's graph has no None for a tensor."""
        bias = self.router_bias
        return {
            "x": self.x,
            "weight": self.router_weight,
            "bias": self.x if bias is None else bias,
            "threshold": self.threshold,
            "n_experts": self.n_experts,
            "d_model": self.d_model,
            "HAS_BIAS": bias is not None,
        }

    def gate_up_args(self) -> dict[str, Any]:
        gate = self.up if self.gate is None else self.gate
        return {
            "x": self.x,
            "up": self.up,
            "up_bias": self.x if self.up_bias is None else self.up_bias,
            "gate": gate,
            "gate_bias": self.x if self.gate_bias is None else self.gate_bias,
            "n_experts": self.n_experts,
            "d_model": self.d_model,
            "stride_un": self.up.stride(0),
            "stride_ud": self.up.stride(1),
            "stride_gn": gate.stride(0),
            "stride_gd": gate.stride(1),
            "GROUP": self.group_size,
            "ACT": self.activation,
            "GATED": self.gate is not None,
            "HAS_UP_BIAS": self.up_bias is not None,
            "HAS_GATE_BIAS": self.gate_bias is not None,
            **self.cut_args(),
        }

    def cut_args(self) -> dict[str, Any]:
        return {"cut": self.x if self.cut is None else self.cut, "HAS_CUT": self.cut is not None}

    def down_args(self) -> dict[str, Any]:
        return {
            "down": self.down,
            "bias": self.x if self.down_bias is None else self.down_bias,
            "n_experts": self.n_experts,
            "d_out": self.d_out,
            "stride_do": self.down.stride(0),
            "stride_dn": self.down.stride(1),
            "GROUP": self.group_size,
            "HAS_BIAS": self.down_bias is not None,
        }

    @property
    def layout(self) -> str:
        """Ending of the down kernels' rows in the table: a neuron's weights side by side want other tiles."""
        return "_by_neuron" if self.down.stride(0) == 1 else ""

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def tuned(self, kernel: str) -> Launch:
        """The table's row. A tracer's launch has no room for PDL, the overlap of one launch with the next."""
        launch = tuning.launch_for(kernel, self.device, self.x.element_size() * 8, self.group_size)
        if self.traced and launch.blocks.get("PDL"):
            return replace(launch, blocks={**launch.blocks, "PDL": 0})
        return launch

    def launch(self, kernel: Any, tuned: Launch, blocks: dict[str, int], grid: tuple[int, ...], **args: Any) -> None:
        how: dict[str, Any] = {"num_warps": tuned.num_warps, "num_stages": tuned.num_stages}
        if blocks.get("PDL"):
            how["launch_pdl"] = True
        self.launcher(kernel)[grid](**args, **blocks, **how)


def split(c: Call, blocks: dict[str, int]) -> tuple[int, int]:
    """-> (output tiles, splits of the list of active neurons), for about PROGRAMS programs in all."""
    n_tiles = triton.cdiv(c.d_out, blocks["BLOCK_O"])
    wanted = min(blocks.pop("PROGRAMS") // n_tiles, c.n_experts, MAX_SPLITS)
    return n_tiles, 1 << (max(wanted, 1).bit_length() - 1)


def parts_of(c: Call, splits: int, unused: Tensor) -> Tensor:
    """fp32 room for each split's part of y; a pointer that is never followed where there is one split."""
    return c.empty(splits, c.n_tokens, c.d_out, dtype=torch.float32) if splits > 1 else unused
