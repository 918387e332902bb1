"""The sparse op with int8 weights over more tokens than are handled together."""

from __future__ import annotations

import pytest

from ltepass.kernels.routed_schema import LINEAR_INT8
from tests.kernels import routed_cases
from tests.kernels.int8_cases import assert_values, call, decided, quantised
from tests.kernels.routed_cases import Recipe
from tests.kernels.test_routed_int8 import check


@pytest.mark.parametrize("mask", ["random", "all"])
def test_longer_inputs_go_in_spans(mask: str) -> None:
    check(Recipe(T=4100, d_model=33, n_experts=3, d_out=9, mask=mask))


def test_dense_chunks_among_sparse_ones() -> None:
    """512 tokens decide together whether all neurons are computed."""
    args = list(quantised(LINEAR_INT8, routed_cases.make(Recipe(T=1700, d_model=33, n_experts=3, d_out=9))))
    for first in (0, 1024):
        args[0][first : first + 512, :3] = 2.0
    mask = decided(LINEAR_INT8, tuple(args))
    assert mask[:512].all()
    assert mask[1024:1536].all()
    assert mask[512:1024].float().mean() < 0.7
    assert_values(tuple(args), mask, call(LINEAR_INT8, tuple(args)))
