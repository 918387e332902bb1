"""The op with an input cut: small entries of x are left out of up and gate, in every path and in the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltepass.kernels.routed_ffn  # noqa: F401 -- defines the op
from ltepass.kernels import reference
from tests.kernels.routed_cases import ARGUMENTS, LAYOUTS, Recipe, assert_values, doubled, make, size_of_terms

op = torch.ops.ltepass.routed_ffn


def with_cut(recipe: Recipe, share: float) -> tuple[Any, ...]:
    """Arguments with no cut of hidden units, and an input cut between two sizes: x is compared as it is."""
    args = make(recipe)
    sizes = args[0].abs().float().flatten().unique()
    if len(sizes) < 2:
        return (*args, None, torch.tensor(0.1))
    at = min(max(int(share * len(sizes)), 1), len(sizes) - 1)
    return (*args, None, sizes[at - 1 : at + 1].mean())


recipes = st.builds(
    Recipe,
    T=st.sampled_from((0, 1, 1, 2, 5, 33, 63, 600)),
    d_model=st.sampled_from((1, 60, 63, 100)),
    n_experts=st.sampled_from((1, 2, 7, 10)),
    group_size=st.sampled_from((1, 8, 9, 16, 32, 33)),
    d_out=st.sampled_from((1, 60, 63)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    gated=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(("random", "none", "one", "all")),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(tuple(reference.ACTIVATIONS)),
    seed=st.integers(0, 100),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(recipes, st.sampled_from((0.1, 0.5, 0.9)))
def test_any_shape_and_layout(recipe: Recipe, share: float) -> None:
    args = with_cut(recipe, share)
    y, mask, count = torch.ops.ltepass.routed_ffn_with_mask(*args)
    assert torch.equal(mask, reference.mask(*args[:4])), "routers see all of x"
    assert int(count) == int(mask.sum())
    assert torch.equal(y, op(*args))
    # an FFN with this decision, on what the cut leaves of x
    seen = reference.leave_out_small(args[0], args[12])
    assert torch.equal(reference.routed_ffn(*args), reference.masked_ffn(seen, mask, *args[4:11]))
    judged = (*args[:3], args[3].double(), *args[4:])
    assert_values(y, judged)


@pytest.mark.parametrize("T", [1, 5, 600])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_the_cut_leaves_something_out(T: int, layout: str) -> None:
    args = with_cut(Recipe(T=T, layout=layout), 0.5)
    whole, part = op(*args[:11]), op(*args)
    assert (whole - part).abs().max() > 1e-3 * whole.abs().max()
    for none in (torch.tensor(-1.0), None):
        assert torch.equal(op(*args[:12], none), whole)


@pytest.mark.parametrize("T", [1, 5])
def test_both_cuts(T: int) -> None:
    *args, _, input_cut = with_cut(Recipe(T=T, layout="conv1d"), 0.5)
    both = (*args, torch.tensor(0.2), input_cut)
    exact = reference.routed_ffn(*doubled(both))
    assert (op(*both).double() - exact).abs().max() < 2e-6 * size_of_terms(doubled(tuple(args)))
    for one in ((*args, torch.tensor(0.2)), (*args, None, input_cut)):
        assert not torch.allclose(op(*one), op(*both))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [8, 9, 32])
def test_one_token_reads_no_weight_of_a_small_input(dtype: torch.dtype, group_size: int) -> None:
    args = list(with_cut(Recipe(T=1, layout="conv1d", dtype=dtype, d_model=63, group_size=group_size), 0.5))
    expected = op(*args)
    small = args[0][0].abs() <= args[12]
    args[4][:, small] = args[6][:, small] = torch.nan
    assert torch.equal(op(*args), expected)
    args[4][:, ~small] = torch.nan
    assert op(*args).isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_every_thread_count_gives_the_same_bits(threads: int) -> None:
    args = with_cut(Recipe(T=1, layout="conv1d", n_experts=21, group_size=9, d_model=100), 0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = op(*args)
    torch.set_num_threads(threads)
    assert torch.equal(op(*args), expected)
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipes.filter(lambda r: 0 < r.T < 64 and r.dtype == torch.float32), st.sampled_from((0.3, 0.7)))
def test_gradients_by_name(recipe: Recipe, share: float) -> None:
    args = with_cut(recipe, share)
    grad = torch.randn(recipe.T, recipe.d_out, generator=torch.Generator().manual_seed(recipe.seed))
    found = []
    for ffn in (op, reference.routed_ffn):
        leaves: list[Any] = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args[:11]]
        (ffn(*leaves, *args[11:]) * grad).sum().backward()
        found.append(leaves)
    small = args[0].abs() <= args[12]
    for name, a, b in zip(ARGUMENTS, *found, strict=False):
        if a is None or name in ("router_weight", "router_bias", "threshold"):
            continue
        scale = b.grad.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=0, atol=2e-5)
    assert not found[0][0].grad[small].any(), "what is left out has no gradient"


@pytest.mark.parametrize("name", ["routed_ffn", "routed_ffn_with_mask"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool) -> None:
    *args, cut, input_cut = with_cut(Recipe(T=5), 0.5)
    if grad:
        args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(getattr(torch.ops.ltepass, name).default, (*args, cut, input_cut))


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros((), dtype=torch.float64)])
def test_a_cut_of_another_shape_or_dtype_is_refused(wrong: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"input_cut should be \[\] fp32"):
        op(*make(Recipe()), None, wrong)
