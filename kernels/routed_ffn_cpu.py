from __future__ import annotations

import torch


def load() -> bool:
    return False


def which_path(T: int, d_model: int, d_ff: int, n_experts: int, dtype: torch.dtype) -> str:
    return "masked dense (PyTorch)"
