"""The kernels' arithmetic without a GPU. Run by test_interpreter.py, under TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ltepass.errors import LTEError
from ltepass.kernels import reference
from ltepass.kernels.gpu import which_path
from ltepass.kernels.gpu.launch import routed_ffn, routed_ffn_with_mask
from tests.gpu import ffn_cases
from tests.gpu.ffn_cases import Case
from tests.kernels.routed_cases import doubled

pytestmark = pytest.mark.usefixtures("poisoned")

FP32_LIMIT = 1e-6  # another order of summation
FACTOR_16_BIT = 1.3  # times PyTorch's own error; ours rounds less often, but short outputs make both figures noisy
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (tokens, calibrated density) that lead to each path, and to both tile widths of "union"
PATHS = {"one": (1, None), "union 16": (2, None), "union 32": (17, 0.1), "grouped": (37, 0.1), "dense": (37, None)}


def run(args: tuple[Any, ...], density: float | None = None) -> torch.Tensor:
    with which_path.assume_density(density):
        return routed_ffn(*args)


def check(case: Case, density: float | None = None) -> None:
    check_values(ffn_cases.make(case), case.dtype, density)


def check_values(args: tuple[Any, ...], dtype: torch.dtype, density: float | None) -> torch.Tensor:
    """What the kernels gave."""
    with which_path.assume_density(density):
        y, mask = routed_ffn_with_mask(*args)
    assert torch.equal(mask, reference.mask(*args[:4]))
    ours, torchs = ffn_cases.errors(y, args)
    assert ours <= (FP32_LIMIT if dtype == torch.float32 else FACTOR_16_BIT * torchs), (ours, torchs)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "fused", "neuron"])
def test_every_path_in_every_dtype_and_layout(path: str, dtype: torch.dtype, layout: str) -> None:
    T, density = PATHS[path]
    args = ffn_cases.make(Case(T=T, dtype=dtype, layout=layout))
    assert torch.equal(check_values(args, dtype, density), run(args, density)), "without the mask, and once more"


@pytest.mark.parametrize("path", ["one", "union 16", "grouped", "dense"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_activation_gated_and_plain(activation: str, path: str) -> None:
    T, density = PATHS[path]
    for gated, bias in ((True, False), (False, True)):
        check(Case(T=T, activation=activation, gated=gated, bias=bias, d_model=20, n_experts=2, d_out=9), density)


@pytest.mark.parametrize("group_size", [8, 32, 43, 128])
def test_every_group_size(group_size: int) -> None:
    for T, density in PATHS.values():
        check(Case(T=T, group_size=group_size, n_experts=2, d_model=20, d_out=9), density)


def test_odd_shapes() -> None:
    for T, density in PATHS.values():
        check(Case(T=T, d_model=1, n_experts=1, group_size=1, d_out=1, density=1.0), density)
        check(Case(T=T, d_model=128, n_experts=2, group_size=60, d_out=100), density)


def test_more_experts_than_one_block_of_the_list() -> None:
    args = ffn_cases.make(Case(T=1, d_model=8, n_experts=530, group_size=1, d_out=3, density=0.02))
    args[2][513:520] = 1e3
    assert ffn_cases.errors(run(args), args)[0] <= FP32_LIMIT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("active", [0.0, 1.0])
def test_no_expert_and_all_experts_active(path: str, active: float) -> None:
    T, density = PATHS[path]
    case = Case(T=T, density=active)
    check(case, density)
    if active == 0.0:
        args = ffn_cases.make(case)
        assert torch.equal(run(args, density), args[9].expand(T, -1))  # the bias, bit for bit


@pytest.mark.parametrize("path", PATHS)
def test_the_mask_that_comes_back_is_what_the_kernels_decided(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second computation may round another way: nothing but the kernels' own buffer can say what they did."""
    T, density = PATHS[path]
    args = ffn_cases.make(Case(T=T))
    expected = reference.mask(*args[:4])
    monkeypatch.setattr(reference, "mask", lambda *_: pytest.fail("decided a second time"))
    with which_path.assume_density(density):
        _, mask = routed_ffn_with_mask(*args)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (), (2, 3), (1, 1)])
def test_leading_axes_and_no_tokens(leading: tuple[int, ...]) -> None:
    args = ffn_cases.make(Case(T=max(torch.Size(leading).numel(), 1)))
    x = args[0][: torch.Size(leading).numel()].reshape(*leading, 63)
    y, mask = routed_ffn_with_mask(x, *args[1:])
    assert y.shape == (*leading, 41)
    assert torch.equal(mask, reference.mask(x, *args[1:4]))
    torch.testing.assert_close(y, reference.routed_ffn(x, *args[1:]), rtol=1e-5, atol=1e-5)


def test_x_may_have_strides() -> None:
    args = ffn_cases.make(Case(T=4))
    columns = args[0].t().contiguous().t()
    assert torch.equal(routed_ffn(columns, *args[1:]), routed_ffn(*args))


@pytest.mark.parametrize("path", ["one", "union 16", "union 32", "grouped"])
def test_weights_of_inactive_experts_are_never_read(path: str) -> None:
    T, density = PATHS[path]
    args = list(ffn_cases.make(Case(T=T, n_experts=9, group_size=8)))
    logits = torch.nn.functional.linear(args[0], args[1], args[2])
    args[3] = logits.amax(0).median() + 1e-3  # half of the experts are wanted by no token
    unused = ~reference.mask(*args[:4]).any(0).repeat_interleave(8)
    assert 0 < unused.sum() < unused.numel()
    clean = run(tuple(args), density)
    for weight in (4, 5, 6, 7):
        args[weight] = args[weight].clone()
        args[weight][unused] = float("nan")
    if path != "grouped":  # whose down product is dense, over zeros
        args[8] = args[8].clone()
        args[8][:, unused] = float("nan")
    assert torch.equal(run(tuple(args), density), clean)


def test_a_token_of_a_batch_computes_what_it_computes_alone() -> None:
    args = ffn_cases.make(Case(T=9))
    assert not reference.mask(*args[:4]).all(-1).any()  # each token misses experts that others of the batch want
    together = routed_ffn(*args)
    alone = torch.cat([routed_ffn(x[None], *args[1:]) for x in args[0]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "neuron"])
def test_programs_may_run_in_any_order(path: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: whoever takes the last ticket adds the parts in the same order."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx
    T, density = PATHS[path]
    args = ffn_cases.make(Case(T=T, layout=layout, n_experts=9, group_size=8, d_model=30))
    first = run(args, density)

    def backward(*index: int) -> None:
        forward(*(n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backward)
    assert torch.equal(run(args, density), first)


@pytest.mark.parametrize("path", ["one", "union 16", "grouped"])
def test_offsets_past_two_to_the_31(path: str) -> None:
    """Rows 2^28 elements apart in 6 GB of address space, of which only the rows themselves are ever touched."""
    T, density = PATHS[path]
    args = list(ffn_cases.make(Case(T=T, dtype=torch.float16, n_experts=3, group_size=4, d_out=11)))
    far = torch.empty(12 * 2**28, dtype=torch.float16)
    small = run(tuple(args), density)
    for start, weight in ((0, 4), (100, 6), (200, 8)):
        rows = far.as_strided(args[weight].shape, (2**28, 1), start)
        args[weight] = rows.copy_(args[weight])
    assert torch.equal(run(tuple(args), density), small)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["one", "union 32", "dense"])
def test_decisions_are_fp32_decisions(path: str, dtype: torch.dtype) -> None:
    """Logits near 10 and 1e-4 from the threshold: a router weight in bf16 or tf32 would be 3e-2 or 4e-3 off."""
    T, density = PATHS[path]
    check(Case(T=T, dtype=dtype, n_experts=60, group_size=1, d_out=30, margin=1e-4, seed=2), density)


def test_the_threshold_is_read_on_every_call() -> None:
    args = ffn_cases.make(Case(T=1))
    assert not torch.equal(routed_ffn(*args)[0], args[9])
    args[3].fill_(float("inf"))
    assert torch.equal(routed_ffn(*args)[0], args[9])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "fused", "neuron"])
def test_hidden_units_up_to_a_cut_are_left_out(path: str, layout: str) -> None:
    T, density = PATHS[path]
    args = ffn_cases.make(Case(T=T, layout=layout, cut=0.6))
    cut, whole = check_values(args, torch.float32, density), run(args[:11], density)
    assert (cut - whole).abs().max() > 1e-3
    assert torch.equal(run((*args[:11], torch.tensor(-1.0)), density), whole)  # negative: none is small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2])  # of few units, so that rounding moves none across the cut
def test_a_cut_in_16_bits(T: int, dtype: torch.dtype) -> None:
    check(Case(T=T, dtype=dtype, layout="neuron", cut=0.6))


def test_one_token_reads_no_weight_of_down_whose_hidden_unit_is_cut() -> None:
    args = list(ffn_cases.make(Case(T=1, layout="neuron", cut=0.6)))
    clean, sizes = routed_ffn(*args), ffn_cases.hidden(tuple(args))[0].abs()
    args[8] = args[8].clone()
    args[8][:, sizes < 0.9 * args[11]] = float("nan")
    assert torch.equal(routed_ffn(*args), clean)
    args[8][:, sizes > 1.1 * args[11]] = float("nan")
    assert routed_ffn(*args).isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_is_not_small(path: str) -> None:
    T, density = PATHS[path]
    args = list(ffn_cases.make(Case(T=T, density=1.0, cut=0.5)))
    args[4][3, 5] = float("nan")  # of one neuron's up weights
    assert run(tuple(args), density).isnan().all()


def test_float64_runs_the_definition_and_mixed_dtypes_are_refused() -> None:
    args = ffn_cases.make(Case(T=3))
    wide = doubled(args)
    assert torch.equal(routed_ffn(*wide), reference.routed_ffn(*wide))
    with pytest.raises(LTEError, match=r"x is torch\.float32 and the weights are torch\.float16; .* cast the model"):
        routed_ffn(*args[:4], *(a.half() if isinstance(a, torch.Tensor) else a for a in args[4:]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, float | None]:
    T, density = draw(st.sampled_from(list(PATHS.values())))
    sizes: dict[str, Any] = {
        k: draw(st.integers(1, n)) for k, n in (("d_model", 70), ("group_size", 20), ("n_experts", 6), ("d_out", 70))
    }
    kinds = draw(st.sampled_from(list(itertools.product(reference.ACTIVATIONS, (True, False), (True, False)))))
    more: dict[str, Any] = {
        "layout": draw(st.sampled_from(["rows", "fused", "neuron"])),
        "density": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "cut": draw(st.sampled_from([None, 0.3, 0.8])),
    }
    activation, gated, bias = kinds
    return Case(T=T, activation=activation, gated=gated, bias=bias, **sizes, **more), density


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(cases())
def test_any_ffn(drawn: tuple[Case, float | None]) -> None:
    check(*drawn)
