"""The C++ kernels of the linear ops against fp64: any shape, the same bits for any number of threads and of tokens."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltepass.kernels import linear_reference
from ltepass.kernels.cpu import loading
from tests.child import environment
from tests.kernels.isa_levels import LEVELS
from tests.kernels.linear_cases import DTYPES, FORMATS, Recipe, assert_values, exact, make, op

formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(recipe: Recipe) -> None:
    args = make(recipe)
    assert_values(recipe, args, op(recipe)(*args))


def test_the_cpp_kernel_is_what_runs() -> None:
    assert loading.load()
    for name in ("linear", "linear_int8", "linear_int4", "_linear_no_grad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ltepass::{name}", "CPU")


recipes = st.builds(
    Recipe,
    format=st.sampled_from(FORMATS),
    T=st.one_of(st.integers(0, 40), st.sampled_from((33, 65))),
    d_in=st.one_of(st.integers(0, 200), st.sampled_from((256, 257, 1000, 1056))),
    d_out=st.one_of(st.integers(0, 70), st.sampled_from((200, 513))),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(recipes)
def test_any_shape(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(recipes)
def test_any_shape_deep(recipe: Recipe) -> None:
    check(recipe)


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads_and_of_tokens(format: str, dtype: torch.dtype) -> None:
    """Every output is summed by one thread in one order, whoever else is there."""
    recipe = Recipe(format=format, T=32, d_in=608, d_out=521, dtype=dtype)
    x, *rest = make(recipe)
    torch.set_num_threads(1)
    alone = torch.cat([op(recipe)(x[i : i + 1], *rest) for i in range(32)])
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for T in (1, 2, 3, 4, 5, 6, 7, 8, 13, 32):
            assert torch.equal(op(recipe)(x[:T], *rest), alone[:T]), (threads, T)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_longer_inputs_have_the_same_bits_for_any_number_of_threads_and_of_tokens(format: str) -> None:
    recipe = Recipe(format=format, T=530, d_in=1088, d_out=140)
    x, *rest = make(recipe)
    torch.set_num_threads(1)
    alone = op(recipe)(x, *rest)
    for threads, T in ((1, 33), (2, 38), (3, 60), (2, 512), (8, 517)):
        torch.set_num_threads(threads)
        assert torch.equal(op(recipe)(x[-T:], *rest), alone[-T:]), (threads, T)


@formats
def test_rows_may_lie_apart_and_lines_of_others_are_not_read(format: str) -> None:
    for T in (5, 35):
        recipe = Recipe(format=format, T=T, d_in=96, d_out=21)
        x, codes, *rest = make(recipe)
        fused = torch.cat([codes, torch.full_like(codes, 77)], 1)[:, : codes.shape[1]]
        assert not fused.is_contiguous()
        assert torch.equal(op(recipe)(x, fused, *rest), op(recipe)(x, codes, *rest))


@formats
def test_extreme_codes(format: str) -> None:
    """Where products of bytes are added in 16 bits, these would not fit were they not what the formats allow."""
    for recipe in (Recipe(format=format, T=T, d_in=192, d_out=9) for T in (1, 4, 6, 34)):
        x, codes, *rest = make(recipe)
        if codes.dtype.is_floating_point:
            return
        for low, high in ((-128, 127), (-127, -127), (127, 127)):
            both = torch.tensor([low, high]) if codes.dtype == torch.int8 else torch.tensor([0, 255])
            extreme = both[torch.arange(codes.numel()) % 2].view(codes.shape).to(codes.dtype)
            for sign in (x.abs().clamp_min(3), -x.abs().clamp_min(3), torch.where(x > 0, 3.0, -3.0)):
                args = (sign.clamp(-3, 3), extreme, *rest)
                assert_values(recipe, args, op(recipe)(*args))


@pytest.mark.parametrize("format", FORMATS[1:])
@pytest.mark.parametrize(
    ("T", "d_in", "d_out"), [(1, 320, 50), (6, 320, 50), (33, 320, 50), (40, 1088, 130), (519, 64, 64)]
)
def test_whole_numbers_come_out_exactly(format: str, T: int, d_in: int, d_out: int) -> None:
    """Where every scale is a power of two, nothing is rounded: kernel and definition are equal to the bit."""
    recipe = Recipe(format=format, T=T, d_in=d_in, d_out=d_out, bias=False)
    x, codes, scale, *rest = make(recipe)
    x = (x * 40).round().clamp(-127, 127)
    x[:, ::32] = 127  # the largest of each block, so that its scale is 1
    rest = [None if t is None else torch.full_like(t, 0.5) for t in rest]
    args = (x, codes, torch.full_like(scale, 0.25), *rest)
    assert torch.equal(op(recipe)(*args), getattr(linear_reference, format.split()[0])(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_quantised_as_the_definition_has_it(dtype: torch.dtype) -> None:
    """Ties go to the even code; a weight that picks one input shows its code and scale."""
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.49]).repeat(8)[None].to(dtype)
    x = torch.cat([x, x * 3e-3, x * 1e-7, torch.zeros_like(x)])
    pick = torch.eye(64, dtype=torch.int8)
    args = (x, pick, torch.ones(64), None)
    assert torch.equal(torch.ops.ltepass.linear_int8(*args), linear_reference.linear_int8(*args))


@pytest.mark.parametrize("T", [6, 40])
@formats
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_fault_in_one_token_stays_visible_and_stays_there(format: str, fault: float, T: int) -> None:
    recipe = Recipe(format=format, T=T, d_in=160, d_out=33)
    x, *rest = make(recipe)
    x[4, 70] = fault
    y = op(recipe)(x, *rest)
    assert not y[4].isfinite().any()
    others = [i for i in range(T) if i != 4]
    assert torch.equal(y[others], op(recipe)(x[others], *rest))


@formats
def test_sizes_at_the_ends_of_fp32(format: str) -> None:
    for scale in (1e-44, 1e-38, 1e-30, 1e30):
        recipe = Recipe(format=format, T=2, bias=False)
        x, *rest = make(recipe)
        args = (x * scale, *rest)
        y, wanted = op(recipe)(*args).double(), exact(recipe, args)
        assert ((y - wanted).abs() <= 1e-5 * wanted.abs().max() + 1e-37).all()


def test_a_weight_that_lies_the_other_way_round_goes_to_the_library() -> None:
    recipe = Recipe(T=3, d_in=100, d_out=30)
    x, weight, bias = make(recipe)
    turned = weight.t().contiguous().t()
    assert_values(recipe, (x, turned, bias), torch.ops.ltepass.linear(x, turned, bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_longer_inputs_take_the_weight_tile_by_tile(dtype: torch.dtype, contiguous: bool, bias: bool) -> None:
    check(Recipe(T=33, d_in=70, d_out=2100, dtype=dtype, contiguous=contiguous, bias=bias))


def test_many_python_threads_at_once() -> None:
    cases = [Recipe(format=f, T=1 + i * 3, d_in=96 + 32 * i, d_out=300 + i) for i, f in enumerate(FORMATS * 2)]
    args = [make(c) for c in cases]
    expected = [op(c)(*a) for c, a in zip(cases, args, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(30):
            if not torch.equal(op(cases[i])(*args[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


CHECK = """
import torch
from ltepass.kernels.cpu import loading
from tests.kernels.linear_cases import DTYPES, FORMATS, Recipe, assert_values, make, op
import ltepass.kernels.linear
assert loading.load()
for format in FORMATS:
    for dtype in DTYPES:
        for T, d_in, d_out in ((1, 64, 9), (2, 31, 40), (3, 576, 17), (4, 100, 8), (6, 160, 70), (40, 1120, 70)):
            recipe = Recipe(format=format, T=T, d_in=d_in, d_out=d_out, dtype=dtype)
            args = make(recipe)
            assert_values(recipe, args, op(recipe)(*args))
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_that_this_machine_runs(level: str) -> None:
    """Each has loops of its own: with and without sums of products of bytes, of 4, 8 and 16 lanes."""
    env = environment(LTEPASS_ISA=level)
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
