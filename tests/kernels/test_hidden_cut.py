"""The op with a cut: hidden units up to it are left out of the down projection, in every path and in the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltepass.kernels.routed_ffn  # noqa: F401 -- defines the op
from ltepass.kernels import reference, routed_ffn_backward
from tests.kernels.routed_cases import ARGUMENTS, LAYOUTS, Recipe, doubled, hidden, make, size_of_terms
from tests.typed import present

op = torch.ops.ltepass.routed_ffn


def hidden_sizes(args: tuple[Any, ...]) -> Tensor:
    """|h| of active experts' units in fp64, sorted."""
    sizes: Tensor = hidden(doubled(args)).abs().flatten().unique()
    return sizes


def with_cut(recipe: Recipe, share: float) -> tuple[Any, ...]:
    """Arguments with a cut near this quantile, in the widest gap around it: no fp32 rounding moves a unit across."""
    args = make(recipe)
    sizes = hidden_sizes(args)
    sizes = sizes[sizes > 0]
    at = int(share * len(sizes))
    near = sizes[max(at - 8, 0) : at + 9]
    if len(near) < 2:
        return (*args, torch.tensor(0.1))
    widest = int((near[1:] / near[:-1]).argmax())
    return (*args, (near[widest] * near[widest + 1]).sqrt().float())


recipes = st.builds(
    Recipe,
    T=st.sampled_from((0, 1, 2, 5, 33, 63, 600)),
    d_model=st.sampled_from((1, 60, 63)),
    n_experts=st.sampled_from((1, 7)),
    group_size=st.sampled_from((8, 9, 32)),
    gated=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(("random", "none", "one", "all")),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(tuple(reference.ACTIVATIONS)),
    seed=st.integers(0, 100),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(recipes, st.sampled_from((0.1, 0.5, 0.9)))
def test_any_shape_and_layout(recipe: Recipe, share: float) -> None:
    args = with_cut(recipe, share)
    exact = reference.routed_ffn(*doubled(args))
    if exact.numel():
        assert (op(*args).double() - exact).abs().max() < 2e-6 * size_of_terms(doubled(args))
        y, mask, count = torch.ops.ltepass.routed_ffn_with_mask(*args)
        assert torch.equal(y, op(*args))
        assert torch.equal(mask, reference.mask(*args[:4]))
        assert int(count) == int(mask.sum())


@pytest.mark.parametrize("T", [1, 5, 600])
def test_the_cut_leaves_something_out(T: int) -> None:
    args = with_cut(Recipe(T=T), 0.7)
    whole, part = op(*args[:11]), op(*args)
    assert (whole - part).abs().max() > 1e-3 * whole.abs().max()
    assert torch.equal(op(*args[:11], torch.tensor(-1.0)), whole)  # negative: none is small
    assert torch.equal(op(*args[:11], None), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 600])
def test_low_precision_moves_only_units_beside_the_cut(T: int, dtype: torch.dtype) -> None:
    recipe = Recipe(T=T, dtype=dtype, d_model=63)
    args = with_cut(recipe, 0.5)
    cut = args[11]
    beside = float(4 * torch.finfo(dtype).eps * cut)
    low, high = (reference.routed_ffn(*doubled((*args[:11], cut + d))) for d in (-beside, beside))
    exact = reference.routed_ffn(*doubled(args))
    stock = (reference.routed_ffn(*args).double() - exact).abs().max()
    room = (low - high).abs().max() + 1.5 * stock + torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert (op(*args).double() - exact).abs().max() <= room
    assert room < 0.1 * exact.abs().max(), "else nothing is tested"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token_reads_no_row_of_down_up_to_the_cut(dtype: torch.dtype) -> None:
    args = list(with_cut(Recipe(T=1, layout="neuron_rows", dtype=dtype, mask="all", d_model=63), 0.5))
    h = hidden(doubled(tuple(args)))[0].abs()
    expected = op(*args)
    args[8][:, h < 0.9 * args[11]] = torch.nan
    assert torch.equal(op(*args), expected)
    args[8][:, h > 1.1 * args[11]] = torch.nan
    assert op(*args).isnan().all()


@pytest.mark.parametrize("T", [1, 5])
def test_a_nan_is_not_small(T: int) -> None:
    args = list(with_cut(Recipe(T=T, mask="all", bias=False), 0.5))
    args[4][3, 5] = torch.nan  # of one neuron's up weights
    assert op(*args).isnan().all()
    assert reference.routed_ffn(*args).isnan().all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipes, st.sampled_from((torch.float32, torch.float64)))
def test_gradients_by_name(recipe: Recipe, dtype: torch.dtype) -> None:
    args = tuple(
        a.to(dtype) if isinstance(a, Tensor) else a for a in with_cut(replace(recipe, T=min(recipe.T, 63)), 0.5)
    )
    if dtype == torch.float64:
        args = (*args[:11], args[11].float())
    up = torch.randn(args[0].shape[0], args[8].shape[0], generator=torch.Generator().manual_seed(recipe.seed)).to(dtype)
    found = []
    for ffn in (op, reference.routed_ffn):
        leaves: list[Any] = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args[:11]]
        (ffn(*(*leaves, args[11])) * up).sum().backward()
        found.append(leaves)
    for name, a, b in zip(ARGUMENTS, *found, strict=False):
        if a is None or name in ("router_weight", "router_bias", "threshold"):
            continue
        scale = b.grad.abs().max().clamp_min(1e-6) if b.grad.numel() else 1.0
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("gated", [True, False])
def test_active_pairs_alone_give_the_same_gradients(gated: bool) -> None:
    args = doubled(with_cut(Recipe(T=23, gated=gated), 0.5))
    x, *router, up, up_bias, gate, gate_bias, down, _, activation, cut = args
    rest = (x, reference.mask(x, *router), up, up_bias, gate, gate_bias, down, activation, (True,) * 7)
    grad = torch.randn(23, 60, dtype=torch.float64)
    pairs = routed_ffn_backward.per_expert(grad, *rest, cut)
    dense = routed_ffn_backward.masked_dense(grad, *rest, cut)
    without = routed_ffn_backward.masked_dense(grad, *rest)
    for a, b in zip(pairs, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert not torch.allclose(present(dense[1]), present(without[1]))
    assert not torch.allclose(present(dense[5]), present(without[5]))


@pytest.mark.parametrize("name", ["routed_ffn", "routed_ffn_with_mask"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(name: str, grad: bool) -> None:
    *args, cut = with_cut(Recipe(T=5), 0.5)
    if grad:
        args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(getattr(torch.ops.ltepass, name).default, (*args, cut))


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros((), dtype=torch.float64)])
def test_a_cut_of_another_shape_or_dtype_is_refused(wrong: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"cut should be \[\] fp32"):
        op(*make(Recipe()), wrong)
