"""The C++ kernel against the reference: masks first, then values judged in fp64."""

from __future__ import annotations

import subprocess
import sys
import threading
import timeit
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ltepass.kernels.routed_ffn  # noqa: F401 -- defines the op
from ltepass.errors import LTEError
from ltepass.kernels import reference
from ltepass.kernels.cpu import loading
from ltepass.kernels.cpu.which_path import which_path
from tests.child import environment
from tests.kernels.routed_cases import LAYOUTS, Recipe, assert_values, make

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
op = torch.ops.ltepass.routed_ffn_with_mask


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(recipe: Recipe) -> None:
    args = make(recipe)
    y, mask, count = op(*args)
    expected = reference.mask(*args[:4])
    assert torch.equal(mask, expected)
    assert count.item() == expected.sum().item()
    assert y.shape == (recipe.T, recipe.d_out)
    assert y.dtype == recipe.dtype
    assert_values(y, args)
    assert torch.equal(torch.ops.ltepass.routed_ffn(*args), y)


def test_the_cpp_kernel_is_what_runs() -> None:
    assert loading.load()
    assert "C++" in which_path(1, 64, 64, 8, torch.float32)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ltepass::routed_ffn", "CPU")


recipes = st.builds(
    Recipe,
    T=st.sampled_from((0, 1, 2, 3, 8, 9, 33, 63)),
    d_model=st.sampled_from((1, 60, 63, 64, 100)),
    n_experts=st.sampled_from((1, 2, 7, 10)),
    group_size=st.sampled_from((1, 8, 9, 16, 32, 33, 128)),
    d_out=st.sampled_from((1, 60, 63, 96)),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from(("random", "none", "one", "all")),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(tuple(reference.ACTIVATIONS)),
    contiguous=st.booleans(),
    seed=st.integers(0, 1000),
)


# 100 products that cancel: 2.8e-6 of h is rounding, in stock PyTorch as well
CANCELLING = Recipe(T=3, d_model=100, n_experts=2, group_size=1, gated=False, bias=False, activation="relu2", seed=579)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(recipes)
@example(CANCELLING)
def test_any_shape_and_layout(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_the_judge_sees_a_part_in_100_000(activation: str) -> None:
    args = make(Recipe(activation=activation))
    y = op(*args)[0]
    assert_values(y, args)
    with pytest.raises(AssertionError):
        assert_values(y * (1 + 1e-5), args)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(recipes)
def test_any_shape_and_layout_deep(recipe: Recipe) -> None:
    check(recipe)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    for T in (1, 7):
        check(Recipe(T=T, activation=activation, dtype=dtype, d_model=100, n_experts=7, group_size=9))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_far_from_zero(activation: str) -> None:
    """The identity FFN shows the activation itself; tails must keep their digits and NaN must stay NaN."""
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([0.0, -1e4, 1e4, float("nan")])])[:, None]
    one = torch.ones(1, 1)
    y = torch.ops.ltepass.routed_ffn(x, one, None, torch.tensor(-1e9), one, None, None, None, one, None, activation)
    wide = x.double()
    expected = reference.ACTIVATIONS[activation](wide)
    # F.gelu's 1 + erf and 1 + tanh have no digits left far below zero, in fp64 either
    if activation == "gelu":
        expected = wide * 0.5 * torch.erfc(-wide / 2**0.5)
    if activation == "gelu_tanh":
        expected = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    expected = expected.float()
    y[-1], expected[-1] = y[-1].isnan().logical_not(), 1.0  # a NaN logit is not above the threshold: inactive, y = 0
    torch.testing.assert_close(y, expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("T", [40, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_tokens_and_features_than_a_block(T: int, dtype: torch.dtype) -> None:
    check(Recipe(T=T, d_model=1100, n_experts=6, group_size=40, d_out=300, dtype=dtype))


@pytest.mark.parametrize("mask", ["random", "one", "all"])
@pytest.mark.parametrize("n_experts", [1, 3, 10, 41])
@pytest.mark.parametrize("T", [2, 4, 7, 32])
def test_few_tokens_with_down_by_parts_of_the_experts(T: int, n_experts: int, mask: str) -> None:
    """More and fewer active experts than parts, whole blocks of output columns and a rest, on any number of threads."""
    for d_out, group_size in ((64, 32), (1100, 8)):
        recipe = Recipe(T=T, n_experts=n_experts, mask=mask, layout="neuron_rows", d_out=d_out, group_size=group_size)
        check(recipe)
        assert_same_bits_on_any_threads(recipe)


@pytest.mark.parametrize("mask", ["random", "one", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_with_a_large_down_by_parts_of_the_neurons(dtype: torch.dtype, mask: str) -> None:
    recipe = Recipe(T=1, n_experts=128, group_size=64, d_out=531, dtype=dtype, mask=mask, layout="neuron_rows")
    check(recipe)
    assert_same_bits_on_any_threads(recipe)


def assert_same_bits_on_any_threads(recipe: Recipe) -> None:
    """Every number is summed by one thread in one order."""
    args = make(recipe)
    results = []
    for threads in (1, 2, 3, 5, 8, 2, 1):
        torch.set_num_threads(threads)
        results.append(torch.ops.ltepass.routed_ffn(*args))
    for y in results[1:]:
        assert torch.equal(y, results[0])


@pytest.mark.parametrize("layout", ["linear", "neuron_rows", "conv1d"])
@pytest.mark.parametrize("T", [9, 40])
def test_bf16_in_blocks_and_odd_groups(T: int, layout: str) -> None:
    """Whole vectors, which are read where they lie, over more than a stretch of d_model; hidden units pair by pair."""
    check(Recipe(T=T, d_model=4224, n_experts=3, group_size=33, d_out=300, dtype=torch.bfloat16, layout=layout))


@pytest.mark.parametrize("T", [513, 864])
def test_the_last_chunk_has_fewer_tokens(T: int) -> None:
    """Fewer tokens would take wider blocks of columns, which the buffers of the call have no room for."""
    torch.set_num_threads(1)
    check(Recipe(T=T, d_out=576, bias=False))


@pytest.mark.parametrize("crowded", ["", "all", "first", "last", "alternate", "ends of a span"])
def test_dense_and_sparse_chunks_side_by_side(crowded: str) -> None:
    """Chunks of 512 tokens; neighbouring ones in which most experts are active go to the library's GEMM together, up to
    4,096 tokens at a time. Here x[:, 0] says whether a token wants one expert or all four."""
    T, chunk = 5000, 512
    chunks = -(-T // chunk)
    dense = {
        "": set(),
        "all": set(range(chunks)),
        "first": {0, 1},
        "last": {chunks - 1},
        "alternate": set(range(0, chunks, 2)),
        "ends of a span": {0, 6, 7, 8},
    }[crowded]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, 512, generator=generator)
    x[:, 0] = torch.tensor([1.0 if t // chunk in dense else -1.0 for t in range(T)])
    router = torch.zeros(4, 512)
    router[:, 0] = 1.0
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0])
    up, gate, down = (torch.randn(*s, generator=generator) / 20 for s in ((512, 512), (512, 512), (512, 512)))
    args = (x, router, bias, torch.tensor(0.0), up, None, gate, None, down, None, "silu")
    y, mask, count = op(*args)
    assert torch.equal(mask, reference.mask(*args[:4]))
    assert count.item() == mask.sum().item()
    wanted = reference.masked_ffn(x.double(), mask, up.double(), None, gate.double(), None, down.double(), None, "silu")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.ops.ltepass.routed_ffn(*args), y)


@pytest.mark.parametrize("T", [1, 12])
def test_leading_dimensions(T: int) -> None:
    args = make(Recipe(T=T))
    flat = torch.ops.ltepass.routed_ffn(*args)
    shaped = torch.ops.ltepass.routed_ffn(args[0].view(T, 1, 1, -1), *args[1:])
    assert torch.equal(shaped, flat.view(T, 1, 1, -1))
    vector = torch.ops.ltepass.routed_ffn(args[0][0], *args[1:])
    assert vector.shape == flat.shape[1:]


def test_decision_is_made_in_fp32_with_a_dense_router() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        args = list(make(Recipe(T=63, d_model=100, dtype=dtype)))
        args[1] = torch.randn_like(args[1]) / 10
        _, mask, _ = op(*args)
        logits = torch.nn.functional.linear(args[0].double(), args[1].double(), args[2].double()) - 0.25
        sure = logits.abs() > 1e-5
        assert sure.float().mean() > 0.99
        assert torch.equal(mask[sure], (logits > 0)[sure])


def test_threshold_is_strict() -> None:
    x, router, one = torch.ones(1, 1), torch.ones(2, 1), torch.ones(2, 1)
    router[1] = 1 + 2**-23
    _, mask, _ = op(x, router, None, torch.tensor(1.0), one, None, None, None, one.t(), None, "identity")
    assert mask.tolist() == [[False, True]]


@pytest.mark.parametrize("T", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(T: int, dtype: torch.dtype) -> None:
    recipe = Recipe(T=T, d_model=200, n_experts=20, group_size=16, d_out=100, dtype=dtype, layout="neuron_rows")
    assert_same_bits_on_any_threads(recipe)


WIDTHS = """
import torch
from tests.kernels.routed_cases import Recipe, make
import ltepass.kernels.routed_ffn
for T in (33, 100, 600):
    for d_out in (24, 65, 200, 511, 512, 600):
        for experts in (2, 40, 64):
            for dtype in (torch.float32, torch.bfloat16):
                args = make(Recipe(T=T, d_model=200, n_experts=experts, d_out=d_out, mask="all", dtype=dtype))
                seen = []
                for threads in (1, 2, 3, 8, 16):
                    torch.set_num_threads(threads)
                    seen.append(torch.ops.ltepass.routed_ffn(*args))
                assert all(torch.equal(y, seen[0]) for y in seen), (T, d_out, experts, dtype)
"""


def test_bitwise_repeatable_where_everything_is_active() -> None:
    """Dense products are the library's, which may use more threads than there are cores only where it is told so."""
    env = environment(MKL_DYNAMIC="FALSE", OMP_NUM_THREADS="8", OMP_WAIT_POLICY="passive")
    command = [sys.executable, "-c", WIDTHS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_many_python_threads_at_once() -> None:
    cases = [make(Recipe(T=1 + i % 3 * 5, d_model=96 + i, n_experts=10 + i, seed=i)) for i in range(8)]
    expected = [torch.ops.ltepass.routed_ffn(*c) for c in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        torch.set_num_threads(2)
        for _ in range(50):
            if not torch.equal(torch.ops.ltepass.routed_ffn(*cases[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.slow  # a time is asserted: by its own command alone
def test_a_call_in_16_bits_costs_what_one_in_fp32_does() -> None:
    """What the CPU can do is asked once: in a virtual machine the instruction that tells takes longer than the call."""

    def seconds(dtype: torch.dtype) -> float:
        args = make(Recipe(T=1, d_model=64, group_size=4, dtype=dtype))
        return min(timeit.repeat(lambda: torch.ops.ltepass._routed_ffn_no_grad(*args), number=100, repeat=20)) / 100

    assert seconds(torch.bfloat16) < seconds(torch.float32) + 5e-6


def test_inputs_are_left_alone() -> None:
    args = make(Recipe(T=3, dtype=torch.bfloat16))
    before = [a.clone() for a in args if isinstance(a, torch.Tensor)]
    torch.ops.ltepass.routed_ffn(*args)
    for a, b in zip((a for a in args if isinstance(a, torch.Tensor)), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("T", [1, 6])
def test_nan_in_one_token_stays_there(T: int) -> None:
    args = make(Recipe(T=T, mask="all"))
    args[0][-1, 3] = torch.nan
    y, mask, _ = op(*args)
    assert not mask[-1, 3]  # its logit is NaN
    assert y[-1].isnan().all() or not mask[-1].any()
    assert y[:-1].isfinite().all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_reads_no_row_of_down_whose_hidden_unit_is_zero(dtype: torch.dtype, gated: bool) -> None:
    args = list(make(Recipe(T=1, dtype=dtype, gated=gated, activation="relu", layout="neuron_rows", mask="all")))
    y = torch.ops.ltepass.routed_ffn(*args)
    x, pre, bias, down = (args[i] for i in ((0, 6, 7, 8) if gated else (0, 4, 5, 8)))
    dead = torch.nn.functional.linear(x.float(), pre.float(), bias.float())[0] < -0.1
    assert 10 < dead.sum() < 70
    args[8] = down.clone(memory_format=torch.preserve_format)
    args[8][:, dead] = torch.nan
    assert args[8].stride() == down.stride()
    assert torch.equal(torch.ops.ltepass.routed_ffn(*args), y)


@pytest.mark.parametrize(
    ("position", "wrong"),
    [(1, torch.zeros(7, 60)), (1, torch.zeros(10, 61)), (4, torch.zeros(80, 61)), (6, torch.zeros(40, 60))],
)
def test_shapes_that_do_not_fit_are_refused(position: int, wrong: torch.Tensor) -> None:
    args = list(make(Recipe()))
    args[position] = wrong
    with pytest.raises((RuntimeError, LTEError), match=r"experts|shape"):
        torch.ops.ltepass.routed_ffn(*args)


@pytest.mark.parametrize("position", [1, 4, 5, 8])
def test_mixed_dtypes_are_refused(position: int) -> None:
    args = list(make(Recipe()))
    args[position] = args[position].bfloat16()
    with pytest.raises(RuntimeError, match=r"dtype|fp32"):
        torch.ops.ltepass.routed_ffn(*args)


def test_unknown_activation_is_refused() -> None:
    args = make(Recipe())
    with pytest.raises((RuntimeError, LTEError), match="activation"):
        torch.ops.ltepass.routed_ffn(*args[:-1], "swoosh")
