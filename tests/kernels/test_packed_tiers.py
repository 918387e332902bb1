"""`ltepass::packed_tiered_ffn` as PyTorch sees it, and what is packed; what it computes: test_tiers.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from ltepass.errors import LTEError
from ltepass.kernels import packed_planes, packed_tiers, tiers
from ltepass.kernels.cpu import loading
from tests.kernels.proxy_cases import Recipe
from tests.kernels.tiers_cases import SHARES, assert_values, make, packed
from tests.properties.trees import examples

op = torch.ops.ltepass.packed_tiered_ffn


@examples(60)
@given(st.booleans(), st.integers(1, 200), st.integers(1, 200))
def test_what_is_packed_is_what_comes_out(gated: bool, d_ff: int, d_model: int) -> None:
    args = make(Recipe(T=1, d_model=d_model, n_experts=d_ff, gated=gated))
    planes = tiers.call(args).planes
    both = packed_planes.pack(planes)
    assert (both.high.shape, both.low.shape) == packed_planes.shapes(1 + gated, d_ff, d_model)
    again = packed_planes.unpack(both, d_model)
    for before, after in zip(planes[:3], again[:3], strict=True):
        for a, b in zip(before, after, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_the_cpp_kernel_is_what_runs() -> None:
    assert loading.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ltepass::packed_tiered_ffn", "CPU")


@pytest.mark.parametrize("T", [0, 1, 6])
def test_opcheck(T: int) -> None:
    for form in (Recipe(T=T), Recipe(T=T, gated=False, bias=False, dtype=torch.bfloat16)):
        torch.library.opcheck(op.default, packed(make(form)))


def test_gradients_are_refused_by_name() -> None:
    x, *rest = packed(make(Recipe()))
    with pytest.raises(NotImplementedError, match="packed_tiered_ffn has no gradient; expected ltepass"):
        op(x.requires_grad_(), *rest).sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        op(forward_ad.make_dual(x.detach(), x.detach()), *rest)


def test_vmap_over_x_alone() -> None:
    x, *rest = packed(make(Recipe(T=6)))
    assert torch.equal(torch.vmap(lambda x: op(x, *rest))(x.view(2, 3, -1)), op(x, *rest).view(2, 3, -1))


def test_weights_that_lie_otherwise_are_read_right() -> None:
    args = packed(make(Recipe(T=3)))
    strided = [a.mT.contiguous().mT if isinstance(a, Tensor) and a.dim() > 1 else a for a in args]
    assert torch.equal(op(*strided), op(*args))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(T=1, dtype=torch.bfloat16, gated=False)])
def test_without_a_compiler_plain_pytorch_computes_the_same(recipe: Recipe) -> None:
    for some in SHARES:
        args = make(recipe, *some)
        assert_values(args, packed_tiers.definition(*packed(args)))
        assert torch.equal(packed_tiers.packed_tiered_ffn(*packed(args)), op(*packed(args)))


WRONG: dict[str, tuple[int, Any, str]] = {
    "one linear": (2, lambda t: t[:, :1], r"low is uint8 \[12, 1, 64\]; expected uint8 \[d_ff, 2 or 3, bytes\]"),
    "no neurons": (2, lambda t: t[:0], "low is"),
    "rows too short": (2, lambda t: t[..., 4:], r"low is uint8 \[12, 3, 60\]; expected uint8 \[12, 3, 64\]"),
    "a group more": (1, lambda t: torch.cat((t, t)), r"high is uint8 \[2, 7680\]; expected uint8 \[1, 7680\]"),
    "signed bytes": (1, lambda t: t.to(torch.int8), "high is int8"),
    "biases of one linear": (3, lambda t: t[:1], r"biases is float32 \[1, 12\]; expected float32 \[2, 12\]"),
    "sizes of others": (4, lambda t: t[1:], r"sizes is float32 \[11\]; expected float32 \[12\]"),
    "experts of two": (5, lambda t: t[::2], r"router_weight is float32 \[6\]; expected float32 \[12\]"),
    "a bias each": (6, lambda t: t.expand(12), r"router_bias is float32 \[12\]; expected float32 \[\]"),
    "a threshold each": (7, lambda t: t.expand(12), r"threshold is float32 \[12\]; expected float32 \[\]"),
    "a wide floor": (8, lambda t: t.double(), r"floor is float64 \[\]; expected float32"),
    "a bias in 16 bits": (9, lambda t: t.half(), r"bias is float16 \[60\]; expected float32 \[60\]"),
    "another activation": (10, lambda _: "tanh", "activation"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused_in_cpp_and_in_python(case: str) -> None:
    at, change, words = WRONG[case]
    args = list(packed(make(Recipe())))
    args[at] = change(args[at])
    with pytest.raises(RuntimeError, match=words):
        op(*args)
    with pytest.raises(LTEError, match=words):
        op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
