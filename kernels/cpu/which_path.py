"""Which path a CPU call takes: what the report prints."""

from __future__ import annotations

import torch

from ltepass.kernels.cpu import loading
from ltepass.kernels.cpu.build import isa


def which_path(T: int, d_model: int, d_ff: int, n_experts: int, dtype: torch.dtype) -> str:
    """In words, what a call of T tokens does; the active share, known during the call, decides the rest. dtype: of the
    weights.
    """
    if not loading.load():
        return "masked dense (PyTorch)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8):
        return f"masked dense (PyTorch): no kernel for {str(dtype).removeprefix('torch.')}"
    if T == 1:
        return f"C++ {isa()}: active neurons only"
    share = torch.ops.ltepass._dense_above(torch.empty(0, dtype=dtype), T, d_ff // n_experts)
    dense = f", dense and mask above {share:.0%} active" if share < 1 else ""
    return f"C++ {isa()}: per expert, its own tokens{dense}"
