"""Gradients of the op by name, in the forms that compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltepass.kernels.routed_ffn  # noqa: F401 -- defines the op
from ltepass.kernels import reference, routed_ffn_backward
from tests.kernels.routed_cases import ARGUMENTS, LAYOUTS, Recipe, make, with_grad
from tests.typed import prefixed

op = torch.ops.ltepass.routed_ffn
FROZEN = ("router_weight", "router_bias", "threshold")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(
        Recipe,
        T=st.sampled_from((0, 1, 5, 63)),
        d_model=st.sampled_from((1, 60, 63)),
        n_experts=st.sampled_from((1, 7)),
        group_size=st.sampled_from((8, 9)),
        dtype=st.sampled_from((torch.float32, torch.float64)),
        gated=st.booleans(),
        bias=st.booleans(),
        mask=st.sampled_from(("random", "none", "one", "all")),
        layout=st.sampled_from(LAYOUTS),
        activation=st.sampled_from(tuple(reference.ACTIVATIONS)),
        seed=st.integers(0, 100),
    )
)
def test_gradients_by_name(recipe: Recipe) -> None:
    """Against autograd of the masked form. float64 runs the plain path and the same formula."""
    ours, theirs = with_grad(make(recipe)), with_grad(make(recipe))
    if recipe.dtype == torch.float64:
        ours, theirs = (with_grad(tuple(a.double() if isinstance(a, Tensor) else a for a in s)) for s in (ours, theirs))
    # of the recipe's seed: one that happens to cancel the terms of a gradient leaves only their rounding
    generator = torch.Generator().manual_seed(recipe.seed)
    up = torch.randn(recipe.T, recipe.d_out, dtype=ours[0].dtype, generator=generator)
    (op(*ours) * up).sum().backward()
    (reference.routed_ffn(*theirs) * up).sum().backward()
    tolerance = 1e-10 if recipe.dtype == torch.float64 else 2e-5
    for name, a, b in zip(ARGUMENTS, ours, theirs, strict=False):
        if name in FROZEN or a is None:
            assert a is None or a.grad is None, name
            continue
        assert a.grad is not None, name
        scale = b.grad.abs().max().clamp_min(1e-6) if b.grad.numel() else 1.0
        torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=0, atol=tolerance, msg=prefixed(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mask", ["random", "none", "one", "all"])
@pytest.mark.parametrize("layout", ["linear", "neuron_rows", "conv1d"])
def test_active_pairs_alone_give_the_same_gradients(dtype: torch.dtype, gated: bool, mask: str, layout: str) -> None:
    recipe = Recipe(T=23, gated=gated, mask=mask, layout=layout, d_out=31)
    for needs in ((True,) * 7, (False, True, False, False, True, True, False)):
        args = tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in make(recipe))
        x, *router, up, up_bias, gate, gate_bias, down, _, activation = args
        grad = torch.randn(23, 31, generator=torch.Generator().manual_seed(recipe.seed)).to(dtype)
        active = reference.mask(x, *router)
        plain: list[Any] = [grad, x, active, up, up_bias, gate, gate_bias, down, activation, needs]
        wide: list[Any] = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in plain]
        ours, stock, exact = (
            form(*given)
            for form, given in (
                (routed_ffn_backward.per_expert, plain),
                (routed_ffn_backward.masked_dense, plain),
                (routed_ffn_backward.masked_dense, wide),
            )
        )
        names = ("x", "up", "up_bias", "gate", "gate_bias", "down", "down_bias")
        for name, a, b, w in zip(names, ours, stock, exact, strict=True):
            assert (a is None) == (b is None), name
            if a is None or b is None or w is None:
                continue
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            order = 1e-13 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps  # sums come in another order
            # the norm, not the largest error: among thousands of roundings the largest is a matter of luck
            assert (a - w).norm() <= 1.5 * (b - w).norm() + order * w.norm(), name


def test_active_pairs_are_used_in_eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    def noting(*args: Any) -> Any:
        used.append(len(args[0]))
        return per_expert(*args)

    per_expert = routed_ffn_backward.per_expert
    monkeypatch.setattr(routed_ffn_backward, "per_expert", noting)
    args = make(Recipe(T=6))
    op(args[0].detach().requires_grad_(), *args[1:]).sum().backward()
    assert used == []  # six tokens do not pay
    for name, value in (("LEAST_TOKENS", 0), ("LEAST_GROUP", 1), ("MOST_ACTIVE", 1.0)):
        monkeypatch.setattr(routed_ffn_backward, name, value)
    x = args[0].detach().requires_grad_()
    op(x, *args[1:]).sum().backward()
    assert used == [6]
    first = torch.func.grad(lambda x: op(x, *args[1:]).square().sum())(args[0])
    (second,) = torch.autograd.grad(op(x, *args[1:]).square().sum(), x, create_graph=True)
    assert second.requires_grad
    assert used == [6]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [("x",), ("up",), ("down_bias",), ("gate", "gate_bias"), ("x", "down")])
def test_only_the_wanted_gradients(wanted: tuple[str, ...]) -> None:
    args = tuple(
        a.detach().requires_grad_(name in wanted) if isinstance(a, Tensor) else a
        for name, a in zip((*ARGUMENTS, "activation"), make(Recipe()), strict=True)
    )
    op(*args).sum().backward()
    assert {n for n, a in zip(ARGUMENTS, args, strict=False) if a is not None and a.grad is not None} == set(wanted)


def test_inactive_experts_get_zero_gradients() -> None:
    recipe = Recipe(mask="one")
    args = with_grad(make(recipe))
    op(*args).sum().backward()
    active = slice(5 * recipe.group_size, 6 * recipe.group_size)
    for name, dim in (("up", 0), ("gate", 0), ("down", 1)):
        grad = args[ARGUMENTS.index(name)].grad.movedim(dim, 0)
        assert grad[active].abs().min() > 0, name
        grad[active] = 0
        assert grad.abs().max() == 0, name


def test_low_precision_gradients_are_judged_in_fp64() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        args = make(Recipe(T=31, dtype=dtype))
        wide = with_grad(tuple(a.double() if isinstance(a, Tensor) else a for a in args))
        ours, theirs = with_grad(args), with_grad(args)
        op(*ours).float().square().sum().backward()
        reference.routed_ffn(*theirs).float().square().sum().backward()
        reference.routed_ffn(*wide).square().sum().backward()
        for name, a, b, w in zip(ARGUMENTS, ours, theirs, wide, strict=False):
            if name in FROZEN:
                continue
            error, stock = ((t.grad.double() - w.grad).abs().max().item() for t in (a, b))
            assert error <= 1.5 * stock + 1e-3 * w.grad.abs().max().item(), name
