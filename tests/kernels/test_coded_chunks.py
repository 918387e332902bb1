"""The sparse op with weights in codes over more tokens than are handled together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltepass.kernels.routed_schema import LINEAR_INT4, LINEAR_INT8, RoutedOp
from tests.kernels import routed_cases
from tests.kernels.coded_cases import assert_values, call, decided, quantised
from tests.kernels.routed_cases import Recipe
from tests.kernels.test_routed_codes import check

SIZES = {
    LINEAR_INT8: Recipe(n_experts=3, d_model=33, d_out=9),
    LINEAR_INT4: Recipe(n_experts=3, d_model=32, d_out=96),
}
both = pytest.mark.parametrize("which", SIZES, ids=lambda which: which.name)


@both
@pytest.mark.parametrize("mask", ["random", "all"])
def test_longer_inputs_go_in_spans(which: RoutedOp, mask: str) -> None:
    check(which, replace(SIZES[which], T=4100, mask=mask))


@both
def test_dense_chunks_among_sparse_ones(which: RoutedOp) -> None:
    """512 tokens decide together whether all neurons are computed."""
    args = list(quantised(which, routed_cases.make(replace(SIZES[which], T=1700))))
    for first in (0, 1024):
        args[0][first : first + 512, :3] = 2.0
    mask = decided(which, tuple(args))
    assert mask[:512].all()
    assert mask[1024:1536].all()
    assert mask[512:1024].float().mean() < 0.7
    assert_values(which, tuple(args), mask, call(which, tuple(args)))
