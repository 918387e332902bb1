"""ltepass::cached_attention against fp64: any shape, what it writes and never reads, the same bits for any threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.kernels import attention
from ltepass.kernels.cpu import build, loading
from tests.child import environment
from tests.kernels.isa_levels import LEVELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.ltepass.cached_attention


@dataclass(frozen=True, kw_only=True)
class Recipe:
    batch: int = 1
    kv_heads: int = 2
    group: int = 3
    size: int = 16
    tokens: int = 1
    position: int = 150
    room: int = 5  # of the cache behind the last token
    window: int | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    seed: int = 0


def make(r: Recipe) -> list[Any]:
    """Arguments in schema order. q, k and v lie as models have them: a token's heads together.

    Two layers, the second is asked; NaN wherever nothing has been written yet.
    """
    gen = torch.Generator().manual_seed(r.seed)

    def heads(n: int) -> Tensor:
        return torch.randn(r.batch, r.tokens, n, r.size, generator=gen).to(r.dtype).transpose(1, 2)

    q, k, v = heads(r.kv_heads * r.group), heads(r.kv_heads), heads(r.kv_heads)
    length = r.position + r.tokens + r.room
    cache = torch.randn(2, 2, r.batch, r.kv_heads, length, r.size, generator=gen).to(r.cache_dtype)
    cache[..., r.position :, :] = float("nan")
    return [q, k, v, cache, 1, torch.tensor(r.position), r.size**-0.5, r.window]


def exact(r: Recipe, args: list[Any]) -> tuple[Tensor, Tensor]:
    """The result in fp64, and the cache as it should be afterwards."""
    q, k, v, cache, layer, _, scale, _ = args
    after, end = cache.clone(), r.position + r.tokens
    after[layer, 0, :, :, r.position : end], after[layer, 1, :, :, r.position : end] = k, v
    keys, values = after[layer, :, :, :, :end].double().repeat_interleave(r.group, 2)
    scores = q.double() @ keys.transpose(-1, -2) * scale
    for t in range(r.tokens):
        first = 0 if r.window is None else max(0, r.position + t + 1 - r.window)
        scores[:, :, t, :first] = scores[:, :, t, r.position + t + 1 :] = float("-inf")
    return (scores.softmax(-1) @ values).transpose(1, 2), after


def check(r: Recipe) -> None:
    args = make(r)
    expected, after = exact(r, args)
    y = OP(*args)
    assert y.shape == expected.shape
    assert y.dtype == r.dtype
    assert y.is_contiguous()
    assert torch.equal(args[3].nan_to_num(7), after.nan_to_num(7)), "it writes the tokens' keys and values, and no more"
    most = after[1, 1].double().nan_to_num(0).abs().amax().item()
    assert (y.double() - expected).abs().max().item() <= max(torch.finfo(r.dtype).eps, 4e-6) * most


recipes = st.builds(
    Recipe,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from((1, 2, 3, 4, 5, 9)),
    size=st.sampled_from((1, 3, 8, 16, 20, 64, 72, 130)),
    tokens=st.sampled_from((1, 2, 4, 5, 9, 33)),
    position=st.sampled_from((0, 1, 3, 62, 63, 64, 65, 127, 128, 300)),
    room=st.integers(0, 2),
    window=st.sampled_from((None, 1, 2, 64, 128, 200)),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(recipes)
def test_any_shape(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(recipes)
def test_any_shape_deep(recipe: Recipe) -> None:
    check(recipe)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(recipes)
def test_the_definition_says_the_same(recipe: Recipe) -> None:
    args = make(recipe)
    expected, after = exact(recipe, args)
    y = attention.definition(*args)
    assert torch.equal(args[3].nan_to_num(7), after.nan_to_num(7))
    most = after[1, 1].double().nan_to_num(0).abs().amax().item()
    # torch's attention of many tokens rounds the weights to the dtype as well.
    assert (y.double() - expected).abs().max().item() <= 4 * max(torch.finfo(recipe.dtype).eps, 1e-6) * most


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_the_same_bits_for_any_number_of_threads(tokens: int) -> None:
    recipe = Recipe(batch=2, kv_heads=3, size=64, tokens=tokens, position=2000)
    results = []
    for n in (1, 2, 3, 8):
        torch.set_num_threads(n)
        results.append(OP(*make(recipe)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("window", [None, 7, 100])
def test_the_same_bits_for_any_number_of_longer_tokens(window: int | None) -> None:
    """A token sees nothing of those beside it."""
    recipe = Recipe(batch=2, size=24, tokens=150, position=90, window=window)
    together = make(recipe)
    q, k, v, cache, layer, position, *rest = make(recipe)
    whole, parts, first = OP(*together), [], 0
    for tokens in (5, 64, 13, 68):
        here = slice(first, first + tokens)
        parts.append(OP(q[:, :, here], k[:, :, here], v[:, :, here], cache, layer, position + first, *rest))
        first += tokens
    assert torch.equal(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("tokens", [1, 8])
def test_nan_and_inf_stay_visible(tokens: int) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        args = make(Recipe(tokens=tokens))
        args[3][1, 0, 0, 0, 7] = value  # a key of the first head
        y = OP(*args)
        assert y[:, :, :3].isnan().any()
        assert y[:, :, 3:].isfinite().all(), "the other head's"


def wrong() -> Iterator[tuple[str, list[Any]]]:
    r = Recipe(tokens=2)
    for place, bad, words in (
        (0, torch.randn(2, 2, 16), "batch, heads, tokens, size"),
        (0, torch.randn(1, 6, 2, 16, dtype=torch.float64), "expected float32, bfloat16 or float16"),
        (0, torch.randn(1, 5, 2, 16), "a multiple"),
        (1, torch.randn(1, 2, 3, 16), "one dtype and"),
        (2, torch.randn(1, 2, 2, 16, dtype=torch.bfloat16), "one dtype and"),
        (3, torch.randn(2, 2, 1, 2, 157, 8), "expected contiguous floats"),
        (3, torch.randn(2, 2, 1, 2, 16, 157).transpose(-1, -2), "expected contiguous floats"),
        (4, 2, "expected one of 2"),
        (4, -1, "expected one of 2"),
        (5, torch.tensor(1.5), "expected int64"),
        (5, torch.tensor([1, 2]), "expected int64"),
        (5, torch.tensor(-1), "do not fit into a cache of 157"),
        (5, torch.tensor(156), "do not fit into a cache of 157"),
        (7, 0, "expected at least 1"),
    ):
        args = make(r)
        args[place] = bad
        yield words, args


@pytest.mark.parametrize(("words", "args"), list(wrong()))
@pytest.mark.parametrize("path", [OP, attention.definition], ids=["kernel", "definition"])
def test_what_makes_no_sense_is_refused_in_the_same_words(path: Any, words: str, args: list[Any]) -> None:
    before = args[3].clone()
    with pytest.raises((LTEError, RuntimeError), match=words):
        path(*args)
    assert torch.equal(args[3].nan_to_num(7), before.nan_to_num(7)), "nothing is written"


@pytest.mark.parametrize("tokens", [1, 6])
def test_opcheck(tokens: int) -> None:
    torch.library.opcheck(OP.default, tuple(make(replace(Recipe(tokens=tokens), position=4))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", LEVELS)
def test_every_level_of_the_machine(isa: str) -> None:
    """A process each: the object is chosen once."""
    code = "from tests.kernels import test_attention as t; t.test_any_shape(); t.assert_level()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(LTEPASS_ISA=isa), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]


def assert_level() -> None:
    assert loading.loaded(), build.isa()
