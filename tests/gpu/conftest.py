"""Under TRITON_INTERPRET=1: bfloat16 as a GPU has it. Elsewhere: nothing."""

from __future__ import annotations

import os
from typing import Any

import pytest


def _repair_bfloat16() -> None:
    """triton's interpreter keeps bfloat16 as uint16; it truncates where a GPU rounds, and dot multiplies bits."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_rounding(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, tl.bfloat16)
        return cast(self, src, dst_type)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_rounding, dot_of_values


if os.environ.get("TRITON_INTERPRET") == "1":
    _repair_bfloat16()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer of a call starts as NaN or as a huge index: what a kernel reads unwritten, shows."""
    import torch

    from ltepass.kernels.gpu.call import Call

    def empty(self: Call, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.x.dtype
        value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        return self.x.new_full(shape, value, dtype=dtype)

    monkeypatch.setattr(Call, "empty", empty)
