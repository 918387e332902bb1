"""The linear ops as PyTorch sees them: formats, registration, fakes, gradients, compile, torch.func, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from ltepass.errors import LTEError
from ltepass.kernels import linear, linear_reference, weight_formats
from tests.kernels.linear_cases import DTYPES, FORMATS, Recipe, dense, make, op, size_of_terms

formats = pytest.mark.parametrize("format", FORMATS)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.integers(0, 5), blocks=st.integers(0, 5), seed=st.integers(0, 1000))
def test_packing_two_codes_a_byte_is_undone_by_unpacking(rows: int, blocks: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 32 * blocks), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = weight_formats.pack_int4(codes)
    assert packed.shape == (rows, 16 * blocks)
    assert torch.equal(weight_formats.unpack_int4(packed), codes)


def test_byte_j_of_a_block_holds_weights_j_and_j_plus_16() -> None:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, 32 + 3], codes[0, 32 + 19] = 5, 9
    packed = weight_formats.pack_int4(codes)
    assert packed[0, 16 + 3] == 5 | 9 << 4
    assert packed.count_nonzero() == 1


@pytest.mark.parametrize("with_minimum", [False, True])
def test_four_bits_are_those_of_gguf(with_minimum: bool) -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(7, 96)
    weight[2, 32:64] = 0
    codes, scale, minimum = weight_formats.quantise_int4(weight, with_minimum=with_minimum)
    kind = gguf.GGMLQuantizationType.Q4_1 if with_minimum else gguf.GGMLQuantizationType.Q4_0
    parts = [scale, minimum] if with_minimum else [scale]
    heads = [t.contiguous().view(torch.uint8).view(7, 3, 2) for t in parts if t is not None]
    blocks = torch.cat([*heads, codes.view(7, 3, 16)], -1)
    theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
    assert torch.equal(blocks.flatten(1), theirs)
    dense = torch.from_numpy(gguf.quants.dequantize(theirs.numpy(), kind))
    assert torch.equal(weight_formats.dequantise_int4(codes, scale, minimum), dense)


def test_int8_codes_are_within_half_a_step() -> None:
    weight = torch.randn(9, 50)
    weight[3] = 0
    codes, scale = weight_formats.quantise_int8(weight)
    assert codes.abs().amax(1).tolist() == [0 if i == 3 else 127 for i in range(9)]
    error = (weight_formats.dequantise_int8(codes, scale) - weight).abs()
    assert (error <= 0.501 * scale[:, None]).all()


def test_inputs_of_any_size_have_codes_and_faults_stay_visible() -> None:
    x = torch.zeros(1, 32 * 5)
    x[0, 0], x[0, 32], x[0, 64], x[0, 96] = 3e38, 1e-44, torch.inf, torch.nan
    codes, scale = linear_reference.quantise_inputs(x)
    assert codes[0, 0, 0] == 127
    assert codes[0, 1:].count_nonzero() == 0
    assert scale[0].isfinite().tolist() == [True, True, False, False, True]


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(format: str, dtype: torch.dtype, grad: bool) -> None:
    for recipe in (Recipe(format=format, dtype=dtype), Recipe(format=format, dtype=dtype, T=0, bias=False)):
        x, *rest = make(recipe)
        torch.library.opcheck(op(recipe).default, (x.requires_grad_(grad), *rest))


@formats
def test_any_leading_dimensions(format: str) -> None:
    x, *rest = make(Recipe(format=format, T=6))
    call = op(Recipe(format=format))
    flat = call(x, *rest)
    assert torch.equal(call(x.view(2, 1, 3, -1), *rest), flat.view(2, 1, 3, -1))
    torch.testing.assert_close(call(x[0], *rest), flat[0])


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 0), ()], ids=str)
def test_float_gradients_are_those_of_a_plain_linear(shape: tuple[int, ...]) -> None:
    def grads(call: Any, *args: Tensor) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in args]
        return torch.autograd.grad(call(*leaves).square().sum(), leaves)

    args = (torch.randn(*shape, 20).double(), torch.randn(7, 20).double(), torch.randn(7).double())
    ours, theirs = grads(torch.ops.ltepass.linear, *args), grads(torch.nn.functional.linear, *args)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@formats
def test_quantised_weights_are_constants_of_the_gradient(format: str) -> None:
    recipe = Recipe(format=format, d_in=96)
    x, *stored, bias = make(recipe)
    x.requires_grad_(), bias.requires_grad_()
    op(recipe)(x, *stored, bias).sum().backward()
    torch.testing.assert_close(x.grad[0], dense(recipe, stored).sum(0))
    assert bias.grad.tolist() == [3.0] * 40


@formats
def test_one_graph_forward_and_backward_for_any_number_of_tokens(format: str) -> None:
    recipe = Recipe(format=format)
    call = torch.compile(op(recipe), fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (2, 5):
        x, *rest = make(Recipe(format=format, T=T))
        x.requires_grad_()
        y = call(x, *rest)
        torch.testing.assert_close(y, op(recipe)(x, *rest))
        y.sum().backward()
        assert x.grad is not None


@formats
def test_torch_func(format: str) -> None:
    x, *rest = make(Recipe(format=format, T=6))
    call = op(Recipe(format=format))
    batched = torch.func.vmap(lambda x: call(x, *rest), in_dims=1)(x.view(2, 3, -1))
    assert torch.equal(batched, call(x.view(2, 3, -1).transpose(0, 1), *rest))
    by_func = torch.func.grad(lambda x: call(x, *rest).sum())(x)
    x.requires_grad_()
    call(x, *rest).sum().backward()
    assert torch.equal(by_func, x.grad)
    with pytest.raises(NotImplementedError, match="only x to be batched"):
        torch.func.vmap(lambda w: call(x.detach(), w, *rest[1:]))(rest[0][None])


@formats
def test_a_tangent_is_refused(format: str) -> None:
    x, *rest = make(Recipe(format=format))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        op(Recipe(format=format))(forward_ad.make_dual(x, x), *rest)


@formats
def test_a_module_calls_the_op_without_a_frame_where_nothing_looks_on(format: str) -> None:
    name, args = format.split()[0], make(Recipe(format=format))
    seen: list[Any] = []
    call = getattr(linear, name)

    def ours(gm: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.extend(n.target for n in gm.graph.nodes if n.op == "call_function")
        return gm

    with torch.no_grad():
        y = torch.compile(call, backend=ours, fullgraph=True)(*args)
        assert seen == [getattr(torch.ops.ltepass, name).default]
        assert torch.equal(call(*args), y)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(*args)
    assert any(event.key == f"ltepass::_{name}_no_grad" for event in profile.key_averages())


WRONG: dict[str, tuple[str, int, Any, str]] = {
    "inputs": ("linear", 0, torch.zeros(3, 65), r"x is .*\[3, 65\] and weight .*\[40, 64\]"),
    "a vector for a weight": ("linear", 1, torch.zeros(64), "expected a matrix of float32"),
    "mixed dtypes": ("linear", 1, torch.zeros(40, 64).bfloat16(), "weight is bfloat16"),
    "a bias of another dtype": ("linear", 2, torch.zeros(40).half(), "bias is float16"),
    "a long bias": ("linear", 2, torch.zeros(41), r"bias is float32 \[41\]"),
    "fp64 inputs": ("linear_int8", 0, torch.zeros(3, 64).double(), "expected float32, bfloat16 or float16"),
    "unsigned codes": ("linear_int8", 1, torch.zeros(40, 64, dtype=torch.uint8), "expected a matrix of int8"),
    "a scale a block": ("linear_int8", 2, torch.zeros(40, 2), "one for each row"),
    "signed codes": ("linear_int4", 1, torch.zeros(40, 32, dtype=torch.int8), "expected a matrix of uint8"),
    "part of a block": ("linear_int4", 1, torch.zeros(40, 33, dtype=torch.uint8), "multiple of 32"),
    "fp32 scales": ("linear_int4", 2, torch.zeros(40, 2), r"expected float16 \[40, 2\]"),
    "a minimum a row": ("linear_int4 with a minimum", 3, torch.zeros(40).half(), "minimum is float16"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str, device: str) -> None:
    format, position, wrong, words = WRONG[case]
    args = list(make(Recipe(format=format)))
    args[position] = wrong
    args = [None if a is None else a.to(device) for a in args]
    with pytest.raises((LTEError, RuntimeError), match=words):
        op(Recipe(format=format))(*args)


def test_the_judge_sees_a_wrong_minimum() -> None:
    recipe = Recipe(format="linear_int4 with a minimum")
    args = make(recipe)
    shifted = (*args[:3], args[3] + 0.01, args[4])
    off = (op(recipe)(*args) - op(recipe)(*shifted)).abs()
    assert (off > 1e-6 * size_of_terms(recipe, args)).any()
