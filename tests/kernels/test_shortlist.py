"""`ltepass::linear_shortlist`: bit by bit what the two linears give, whichever outputs are the largest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import linear_reference, shortlist
from ltepass.kernels.cpu import loading
from tests.child import environment
from tests.kernels.isa_levels import LEVELS
from tests.kernels.linear_cases import DTYPES, Recipe, make, stored

ops: Any = torch.ops.ltepass


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(r: Recipe, rows: int) -> tuple[Any, ...]:
    x, weight, bias = make(r)
    codes, scale = stored("linear_int8", weight)
    scan_codes, scan_scale, _ = stored("linear_int4", weight)
    return x, codes, scale, scan_codes, scan_scale, rows, bias


def meant(
    x: Tensor, codes: Tensor, scale: Tensor, scan_codes: Tensor, scan_scale: Tensor, rows: int, bias: Any
) -> Tensor:
    scan = ops.linear_int4(x, scan_codes, scan_scale, None, bias)
    return linear_reference.shortlisted(scan, ops.linear_int8(x, codes, scale, bias), rows)


def check(r: Recipe, rows: int) -> None:
    args = arguments(r, rows)
    y = ops.linear_shortlist(*args)
    assert y.dtype == r.dtype
    assert torch.equal(y, meant(*args))


# Runs of 64 outputs, whose largest are sorted; vectors of 4, 8 and 16; pieces of 32 rows; few and many of the runs.
recipes = st.builds(
    Recipe,
    T=st.sampled_from((0, 1, 1, 2, 7)),
    d_in=st.sampled_from((32, 64, 96, 160, 288)),
    d_out=st.one_of(st.integers(1, 140), st.sampled_from((255, 256, 257, 1000, 4099))),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(recipes, st.one_of(st.integers(1, 70), st.sampled_from((255, 256, 5000))), st.sampled_from((1, 2)))
def test_any_shape(recipe: Recipe, rows: int, threads: int) -> None:
    torch.set_num_threads(threads)
    check(recipe, rows)


def test_the_cpp_kernel_is_what_runs() -> None:
    assert loading.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ltepass::linear_shortlist", "CPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_outputs_are_all_of_the_shortlist(dtype: torch.dtype) -> None:
    x, codes, scale, *scan, _, bias = arguments(Recipe(T=2, d_out=300, dtype=dtype), 5)
    codes, *scan = (t[:1].expand(300, -1).contiguous() for t in (codes, *scan))
    bias = torch.zeros(300, dtype=dtype)
    args = (x, codes, scale[:1].expand(300).contiguous(), *scan, 5, bias)
    y = ops.linear_shortlist(*args)
    assert torch.equal(y, ops.linear_int8(x, codes, args[2], bias))
    assert torch.equal(y, meant(*args))


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_a_fault_stays_in_its_token(what: float) -> None:
    x, *others = arguments(Recipe(T=3, d_out=200), 9)
    sound = ops.linear_shortlist(x, *others)
    x = x.clone()
    x[1, 5] = what
    y = ops.linear_shortlist(x, *others)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], sound[::2])


def test_the_best_are_those_of_8_bits_and_the_others_of_4() -> None:
    x, *others, _, bias = arguments(Recipe(T=4, d_out=500), 1)
    y = ops.linear_shortlist(x, *others, 40, bias)
    scan, exact = ops.linear_int4(x, *others[2:], None, bias), ops.linear_int8(x, *others[:2], bias)
    assert ((y == exact).sum(-1) >= 40).all()
    assert ((y == scan).sum(-1) >= 400).all()
    assert not torch.equal(scan, exact)
    assert torch.equal(y.argmax(-1), exact.argmax(-1))


def test_without_a_compiler_plain_pytorch_computes_the_same() -> None:
    args = arguments(Recipe(T=4, d_out=300), 20)
    torch.testing.assert_close(shortlist._definition(*args), ops.linear_shortlist(*args), rtol=1e-5, atol=1e-5)


def test_opcheck_and_vmap() -> None:
    x, *others = arguments(Recipe(T=6, d_out=90), 7)
    torch.library.opcheck(ops.linear_shortlist.default, (x, *others))
    y = ops.linear_shortlist(x, *others)
    assert torch.equal(torch.vmap(lambda x: ops.linear_shortlist(x, *others))(x.view(3, 2, -1)), y.view(3, 2, -1))
    assert torch.equal(ops.linear_shortlist(x.view(3, 2, -1), *others), y.view(3, 2, -1))


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (0, lambda x: x.double(), "expected float32, bfloat16 or float16"),
        (0, lambda x: x[:, :-1], "expected [..., d_in]"),
        (1, lambda codes: codes.int(), "expected a matrix of"),
        (2, lambda scale: scale[1:], "scale is float32 [39]"),
        (3, lambda codes: codes[1:], "scan|scale is|equal rows"),
        (4, lambda scale: scale.float(), "expected float16"),
        (5, lambda rows: 0, "rows is 0; expected at least 1"),
        (6, lambda bias: bias[1:], "bias is float32 [39]"),
    ],
)
def test_both_sides_refuse_in_words(place: int, change: Any, words: str) -> None:
    args = list(arguments(Recipe(), 3))
    args[place] = change(args[place])
    for call, error in ((ops.linear_shortlist, RuntimeError), (shortlist._definition, LTEError)):
        with pytest.raises(error) as raised:
            call(*args)
        assert any(part in str(raised.value) for part in words.split("|"))


CHECK = """
from tests.kernels.linear_cases import Recipe
from tests.kernels.test_shortlist import check
for T, d_in, d_out, rows in ((1, 96, 1000, 7), (3, 288, 257, 70), (1, 64, 4099, 256), (2, 32, 5, 9)):
    check(Recipe(T=T, d_in=d_in, d_out=d_out), rows)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_that_this_machine_runs(level: str) -> None:
    env = environment(LTEPASS_ISA=level)
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
