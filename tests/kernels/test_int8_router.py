"""Linear routers in int8 decide by the same bits on every path; test_routed_codes runs them on each ISA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltepass.errors import LTEError
from ltepass.kernels import routed_ffn  # noqa: F401 -- defines the op
from ltepass.kernels.routed_codes_reference import MOST_INPUTS, CodedLinear, scores
from ltepass.kernels.routed_schema import LINEAR_INT8
from tests.kernels import routed_cases
from tests.kernels.coded_cases import call, decided, quantised, same_decision, with_close_calls
from tests.kernels.routed_cases import Recipe
from tests.kernels.test_routed_codes import recipes


@settings(max_examples=80, deadline=None, derandomize=True)
@given(recipes, st.sampled_from((1, 2)))
def test_masks_are_those_of_the_definition_bit_by_bit(recipe: Recipe, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for args in with_close_calls(LINEAR_INT8, recipe):
            same_decision(LINEAR_INT8, args)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("d_model", [1100, MOST_INPUTS])
@pytest.mark.parametrize("T", [1, 3])
def test_the_largest_sums_of_a_router_are_exact(T: int, d_model: int) -> None:
    """fp32 sums would round them, and sums of 32 bits hold no more."""
    args = list(quantised(LINEAR_INT8, routed_cases.make(Recipe(T=T, d_model=d_model, n_experts=2, group_size=1))))
    args[0], args[1] = torch.full((T, d_model), 2.0), torch.full((2, d_model), 127, dtype=torch.int8)
    args[1][1, 0] = 126
    args[4] = scores(args[0], CodedLinear(*args[1:4]))[0, 1]
    same_decision(LINEAR_INT8, tuple(args))


@pytest.mark.parametrize("T", [1, 3])
def test_a_router_opens_no_gate_for_a_fault(T: int) -> None:
    """As one in floats: a NaN is not above a threshold."""
    args = list(quantised(LINEAR_INT8, routed_cases.make(Recipe(T=T))))
    args[0][-1, 7], args[10] = torch.nan, torch.ones_like(args[10])
    assert torch.equal(call(LINEAR_INT8, tuple(args))[-1], args[10])
    assert not decided(LINEAR_INT8, tuple(args))[-1].any()


def test_more_inputs_than_32_bits_hold_are_refused() -> None:
    args = quantised(LINEAR_INT8, routed_cases.make(Recipe(T=1, d_model=MOST_INPUTS + 1, n_experts=1, group_size=1)))
    with pytest.raises(RuntimeError, match=f"expected at most {MOST_INPUTS}"):
        call(LINEAR_INT8, args)
    with pytest.raises(LTEError, match=f"expected at most {MOST_INPUTS}"):
        LINEAR_INT8.checked(args)
