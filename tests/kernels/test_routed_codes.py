"""The sparse op with weights in codes: what the definition says, for any shape, on any ISA; and as PyTorch sees it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from ltepass.errors import LTEError
from ltepass.kernels import reference
from ltepass.kernels import routed_ffn as module
from ltepass.kernels.cpu import loading
from ltepass.kernels.routed_schema import IN_CODES, LINEAR_INT4, LINEAR_INT8, PROXY_INT4, PROXY_INT8, RoutedOp
from ltepass.kernels.weight_formats import pack_int4
from tests.child import environment
from tests.kernels import proxy_cases, routed_cases
from tests.kernels.coded_cases import assert_values, call, decided, exact, quantised, same_decision, ties
from tests.kernels.isa_levels import LEVELS
from tests.kernels.routed_cases import LAYOUTS, Recipe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
all_ops = pytest.mark.parametrize("which", IN_CODES, ids=lambda which: which.name)
linear_ops = pytest.mark.parametrize("which", [LINEAR_INT8, LINEAR_INT4], ids=lambda which: which.name)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def some(which: RoutedOp, T: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Arguments of the float op."""
    d = 60 if which.format == "int8" else 96
    if not which.proxied:
        return routed_cases.make(Recipe(T=T, dtype=dtype, d_model=d, d_out=d))
    return proxy_cases.with_ffn(proxy_cases.Recipe(T=T, dtype=dtype, n_experts=40, d_model=d))


def check(which: RoutedOp, recipe: Recipe) -> None:
    floats = routed_cases.make(recipe)
    args = quantised(which, floats)
    assert_values(which, args, decided(which, args), call(which, args))


# Blocks of 32 inputs; 4 rows side by side in a tile, 8 in down; vectors of 4, 8 and 16. Of several tokens 6 (3) in a
# tile, 32 neurons in a block, 4 parts of the experts and 256 columns for up to 32 tokens, 64 columns for more.
shapes: dict[str, Any] = dict(
    d_model=st.one_of(st.integers(1, 140), st.sampled_from((255, 256, 257))),
    n_experts=st.sampled_from((1, 2, 3, 5, 17, 40)),
    group_size=st.sampled_from((1, 2, 3, 4, 5, 8, 17, 31, 32, 33, 65)),
    d_out=st.one_of(st.integers(1, 70), st.sampled_from((130, 256, 257, 513))),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(("random", "random", "none", "all", "one")),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(tuple(reference.ACTIVATIONS)),
    contiguous=st.booleans(),
    seed=st.integers(0, 1000),
)
tokens = st.sampled_from((2, 3, 4, 6, 7, 12, 13, 31, 32, 33, 63))
recipes = st.builds(Recipe, T=st.one_of(st.sampled_from((0, 1)), tokens), **shapes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(recipes, st.sampled_from((1, 2)))
def test_any_shape(recipe: Recipe, threads: int) -> None:
    torch.set_num_threads(threads)
    check(LINEAR_INT8, recipe)


# Blocks of 32 outputs in down as well: a vector's lanes of their scales, whole pieces of 64 and 256 columns, and parts.
blocks = st.sampled_from((1, 2, 3, 4, 5, 8, 9, 15, 16, 17))
recipes_of_blocks = st.builds(
    Recipe,
    T=st.one_of(st.sampled_from((0, 1)), tokens),
    **shapes
    | {"d_model": blocks.map(lambda n: 32 * n), "d_out": blocks.map(lambda n: 32 * n)}
    | {"layout": st.sampled_from(("linear", "conv1d"))},
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(recipes_of_blocks, st.sampled_from((1, 2)))
def test_any_shape_in_4_bits(recipe: Recipe, threads: int) -> None:
    torch.set_num_threads(threads)
    check(LINEAR_INT4, recipe)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(proxy_cases.recipes, st.sampled_from((PROXY_INT8, PROXY_INT4)))
def test_a_proxy_decides_as_it_does_with_floats(recipe: proxy_cases.Recipe, which: RoutedOp) -> None:
    if which.format == "int4":
        recipe = replace(recipe, d_model=round_up(recipe.d_model))
    args = quantised(which, proxy_cases.with_ffn(recipe))
    same_decision(which, args)
    mask = decided(which, args)
    y, wanted = call(which, args), exact(which, args, mask)
    assert torch.equal(y.isfinite().all(-1), wanted.isfinite().all(-1))
    finite = wanted.isfinite().all(-1)
    if finite.any():
        allowed = (1e-5 + torch.finfo(y.dtype).eps) * wanted[finite].abs().max() + ties(which, args, mask) + 1e-37
        assert ((y.double() - wanted).abs() <= allowed)[finite].all()


def test_the_cpp_kernel_is_what_runs() -> None:
    assert loading.load()
    for which in IN_CODES:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ltepass::{which.name}", "CPU")


@all_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 6])
def test_without_a_compiler_plain_pytorch_computes_the_same(which: RoutedOp, T: int, dtype: torch.dtype) -> None:
    args = quantised(which, some(which, T, dtype))
    plain, ours = (y.double() for y in (module._plain(which, False, *args), call(which, args)))
    rounded_once = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    allowed = 2.5 * rounded_once * ours.abs() + 1e-5 + ties(which, args, decided(which, args))
    assert ((plain - ours).abs() <= allowed).all(), "hidden units are not rounded to x's dtype"


@linear_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(which: RoutedOp, dtype: torch.dtype) -> None:
    """Large enough for parts of down; and odd sizes."""
    sizes: tuple[dict[str, Any], ...] = (
        dict(T=1, d_model=608, n_experts=521, group_size=8, d_out=1030),
        dict(T=1, d_model=70, n_experts=43, group_size=1, d_out=521),
        dict(T=9, d_model=96, n_experts=70, group_size=8, d_out=300),
        dict(T=9, d_model=100, n_experts=70, group_size=8, d_out=300),
    )
    for shape in sizes:
        if which.format == "int4":
            shape |= {name: round_up(shape[name]) for name in ("d_model", "d_out")}
        floats = routed_cases.make(Recipe(dtype=dtype, layout="neuron_rows", **shape))
        args = quantised(which, floats)
        torch.set_num_threads(1)
        alone = call(which, args)
        assert_values(which, args, decided(which, args), alone)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(call(which, args), alone), (threads, shape)


@linear_ops
@pytest.mark.parametrize("T", [1, 4, 40])
def test_extreme_codes(which: RoutedOp, T: int) -> None:
    """Where products of bytes are added in 16 bits, these would not fit were they not what the format allows."""
    floats = routed_cases.make(Recipe(T=T, d_model=192, d_out=64, mask="all", activation="identity"))
    x, *rest = quantised(which, floats)
    extreme = torch.where(torch.arange(192) % 2 == 0, 127, -127).to(torch.int8)
    codes = extreme if which.format == "int8" else pack_int4(torch.where(extreme > 0, 15, 0).to(torch.uint8))
    rest[4] = codes.expand_as(rest[4]).contiguous()
    for signs in (x.abs().clamp_min(3), -x.abs().clamp_min(3), torch.where(x > 0, 3.0, -3.0), 3.0 * extreme.sign()):
        args = (signs.expand_as(x), *rest)
        mask = torch.ones(T, 10, dtype=torch.bool)
        assert_values(which, args, mask, call(which, args))


@all_ops
@pytest.mark.parametrize("T", [1, 5])
def test_cuts(which: RoutedOp, T: int) -> None:
    """Small hidden units and small inputs are left out; what decides sees all of x."""
    args = quantised(which, some(which, T))
    cuts = (torch.tensor(0.1), torch.tensor(0.7))
    y = call(which, (*args, *cuts))
    assert torch.allclose(y, module._plain(which, False, *args, *cuts), atol=1e-5)
    assert not torch.allclose(y, call(which, args), atol=1e-3)


@pytest.mark.parametrize("which", [PROXY_INT8, PROXY_INT4], ids=lambda which: which.name)
@pytest.mark.parametrize("T", [1, 3])
def test_a_fault_is_seen(which: RoutedOp, T: int) -> None:
    args = quantised(which, some(which, T))
    args[0][-1, 7] = torch.nan
    y = call(which, args)
    assert not y[-1].isfinite().any()
    assert y[:-1].isfinite().all()


@all_ops
@pytest.mark.parametrize("T", [0, 1, 6])
def test_opcheck(which: RoutedOp, T: int) -> None:
    torch.library.opcheck(
        getattr(torch.ops.ltepass, which.name).default, quantised(which, some(which, T, torch.bfloat16))
    )


@all_ops
def test_gradients_are_refused_by_name(which: RoutedOp) -> None:
    x, *rest = quantised(which, some(which))
    y = call(which, (x.requires_grad_(), *rest))
    with pytest.raises(NotImplementedError, match=rf"{which.name} has no gradient; expected weights in floats"):
        y.sum().backward()
    with torch.no_grad():
        assert not call(which, (x, *rest)).requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(which, (forward_ad.make_dual(x.detach(), x.detach()), *rest))


@all_ops
def test_vmap_over_x_alone(which: RoutedOp) -> None:
    x, *rest = quantised(which, some(which, 6))
    batched = torch.vmap(lambda x: call(which, (x, *rest)))(x.view(2, 3, -1))
    assert torch.equal(batched, call(which, (x, *rest)).view(2, 3, -1))
    with pytest.raises(NotImplementedError, match="only x"):
        torch.vmap(lambda cut: call(which, (x, *rest, cut)))(torch.zeros(2))


def round_up(n: int) -> int:
    return -(-n // 32) * 32


def _wrong() -> dict[str, tuple[int, Any, str]]:
    """Place of an argument of routed_ffn_int8, what it becomes, and what both sides say."""
    return {
        "a double": (0, lambda t: t.double(), "expected float32, bfloat16 or float16"),
        "a float router": (1, lambda t: t.float(), "int8"),
        "a router's scale too short": (2, lambda t: t[:-1], r"router_scale is float32 \[9\]"),
        "float weights": (5, lambda t: t.float(), "int8"),
        "a gate of another shape": (7, lambda t: t[:, :8], "gate"),
        "a scale of another dtype": (11, lambda t: t.half(), "up_scale is float16"),
        "a gate without a scale": (12, lambda t: None, "gate_scale"),
        "a scale too short": (13, lambda t: t[:-1], r"down_scale is float32 \[59\]; expected .*float32 \[60\]"),
    }


def _wrong_in_4_bits() -> dict[str, tuple[int, Any, str]]:
    """The same of routed_ffn_int4."""
    return {
        "signed codes": (5, lambda t: t.to(torch.int8), "up is int8"),
        "an input that is no whole block": (0, lambda t: t[:, :80], "96|80"),
        "down by outputs": (9, lambda t: t.t().contiguous(), "down"),
        "a gate of another shape": (7, lambda t: t[:, :16], "gate"),
        "a scale of another dtype": (11, lambda t: t.float(), r"up_scale is float32 .*float16 \[80, 3\]"),
        "a gate without a scale": (12, lambda t: None, "gate_scale"),
        "a scale an output": (13, lambda t: t[:, 0], r"down_scale is float16 \[80\]; expected float16 \[80, 3\]"),
    }


CASES = [
    (which, case) for which, cases in ((LINEAR_INT8, _wrong()), (LINEAR_INT4, _wrong_in_4_bits())) for case in cases
]


@pytest.mark.parametrize(("which", "case"), CASES, ids=lambda part: getattr(part, "name", part))
def test_what_makes_no_sense_is_refused_in_cpp_and_in_python(which: RoutedOp, case: str) -> None:
    at, change, words = (_wrong() if which is LINEAR_INT8 else _wrong_in_4_bits())[case]
    args = list(quantised(which, some(which)))
    args[at] = change(args[at])
    with pytest.raises(RuntimeError, match=words):
        call(which, tuple(args))
    with pytest.raises(LTEError, match=words):
        call(which, tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args))


CHECK = """
from dataclasses import replace
import torch
from ltepass.kernels.cpu import loading
from tests.kernels.routed_cases import Recipe
from tests.kernels.coded_cases import same_decision, with_close_calls
from tests.kernels.coded_cases import call
from tests.kernels.test_routed_codes import DTYPES, LINEAR_INT4, LINEAR_INT8, check
assert loading.load()
for dtype in DTYPES:
    for T, d_model, n_experts, group_size in ((1, 64, 9, 8), (1, 31, 17, 1), (1, 577, 40, 2), (5, 100, 6, 8)):
        recipe = Recipe(T=T, d_model=d_model, n_experts=n_experts, group_size=group_size, d_out=37, dtype=dtype)
        for which in (LINEAR_INT8, LINEAR_INT4):
            if which is LINEAR_INT4:
                recipe = replace(recipe, d_model=-(-d_model // 32) * 32, d_out=160)
            check(which, recipe)
            check(which, replace(recipe, layout="neuron_rows", gated=False))
            check(which, replace(recipe, T=40, mask="all"))
            for args in with_close_calls(which, recipe):
                same_decision(which, args)
            torch.set_num_threads(1)
            alone = call(which, args)
            torch.set_num_threads(2)
            same = [torch.equal(call(which, args), alone) for _ in range(20)]
            assert all(same), "tokens that are laid at once, in any order"
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_that_this_machine_runs(level: str) -> None:
    """Each has loops of its own: with and without sums of products of bytes, of 4, 8 and 16 lanes."""
    env = environment(LTEPASS_ISA=level, OMP_NUM_THREADS="2")
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
