"""The kernels' arithmetic without a GPU. Run by test_interpreter.py, under TRITON_INTERPRET=1."""

from __future__ import annotations

import ffn_cases
import pytest
import torch
from ffn_cases import Case

from ltepass.kernels import tuning
from ltepass.kernels.routed_ffn_triton import routed_ffn

pytestmark = pytest.mark.usefixtures("poisoned")

# What a sum in another order may cost in fp32; and in 16 bits how much worse than PyTorch's own result ours may be.
# (ours rounds once where PyTorch rounds after every op, but few outputs make both norms noisy)
FP32_LIMIT = 1e-6
FACTOR_16_BIT = 1.25

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATHS = ((1, None), (2, None), (17, 0.1), (32, 1.0), (33, 0.1), (70, 0.1), (70, None))  # (T, calibrated density)


def check(case: Case, density: float | None = None) -> None:
    args = ffn_cases.make(case)
    if density is not None:
        tuning.remember_density(args[3], density)
    ours, torchs = ffn_cases.errors(routed_ffn(*args), args)
    tuning._densities.clear()
    assert ours <= (FP32_LIMIT if case.dtype == torch.float32 else FACTOR_16_BIT * torchs), (ours, torchs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "density"), PATHS)
@pytest.mark.parametrize("layout", ["rows", "fused", "neuron"])
def test_every_path_in_every_dtype_and_layout(T: int, density: float | None, dtype: torch.dtype, layout: str) -> None:
    check(Case(T=T, dtype=dtype, layout=layout), density)
