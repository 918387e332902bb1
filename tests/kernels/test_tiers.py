"""FFNs in tiers of bits: what the definition says, for any shape, on any ISA, of planes as they are and packed; and the
op as PyTorch sees it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor
from torch.autograd import forward_ad

from ltepass.errors import LTEError
from ltepass.kernels import reference, tiers
from ltepass.kernels.cpu import loading
from ltepass.kernels.proxy import proxy_scores
from tests.child import environment
from tests.kernels.isa_levels import LEVELS
from tests.kernels.proxy_cases import Recipe
from tests.kernels.tiers_cases import SHARES, assert_values, make, packed, recipes, shares
from tests.properties.trees import examples

op = torch.ops.ltepass.tiered_ffn
THRESHOLD, FLOOR = 8, 9
Op = Callable[..., Tensor]


def of_packed(*args: Any) -> Tensor:
    return torch.ops.ltepass.packed_tiered_ffn(*packed(args))  # type: ignore[no-any-return]


both = pytest.mark.parametrize("op", [op, of_packed], ids=["planes", "packed"])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# A hidden unit that is little beside the products it sums up: the judge has to be exact.
CANCELLED = Recipe(T=40, d_model=16, n_experts=1, group_size=1, bias=False, size=30.0, seed=869)
# One that the low planes make much larger.
GROWN = Recipe(T=2, d_model=200, n_experts=3, group_size=1, bias=False, size=30.0, seed=180)


@both
@examples(60)
@given(recipe=recipes, some=shares)
@example(recipe=CANCELLED, some=SHARES[0])
@example(recipe=GROWN, some=SHARES[0])
def test_any_shape(op: Op, recipe: Recipe, some: tuple[float, float]) -> None:
    args = make(recipe, *some)
    assert_values(args, op(*args))


def test_the_cpp_kernel_is_what_runs() -> None:
    assert loading.load()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ltepass::tiered_ffn", "CPU")


@both
@pytest.mark.parametrize("gated", [True, False])
def test_each_neuron_is_decided_as_the_proxy_says(gated: bool, op: Op) -> None:
    """Each writes to an output of its own: nothing, its high plane, or both, by the bits of its score."""
    n = 96
    x, *rest = make(Recipe(T=9, d_model=n, n_experts=n, gated=gated, bias=False, activation="identity"))
    alone = torch.full_like(rest[9], 0x88)  # code 0
    for j in range(n):
        alone[0, j, j // 32 * 16 + j % 16] = 0x8F if j % 32 < 16 else 0xF8  # code 7 at input j
    rest[9] = alone
    low = rest[12].clone()
    low[-1] = alone[0]
    rest[12] = low
    logits = proxy_scores(x, *rest[:7], "identity")
    for at in logits.flatten().sort().values[::40]:
        for floor, threshold in ((at, torch.tensor(torch.inf)), (torch.tensor(torch.inf), at)):
            rest[THRESHOLD - 1], rest[FLOOR - 1] = threshold, floor
            assert torch.equal(op(x, *rest) != 0, logits > at)


@both
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("d_model", "d_ff"), [(577, 150), (33, 389), (20, 6200)])
def test_a_tokens_bits_depend_on_nothing_around_it(threads: int, d_model: int, d_ff: int, op: Op) -> None:
    """Within one run of groups of neurons, over several, and over longer ones."""
    args = make(Recipe(T=131 if d_ff < 1000 else 3, d_model=d_model, n_experts=d_ff, activation="gelu"))
    torch.set_num_threads(1)
    expected = torch.cat([op(row[None], *args[1:]) for row in args[0]])
    torch.set_num_threads(threads)
    assert torch.equal(op(*args), expected)
    assert torch.equal(torch.cat([op(row[None], *args[1:]) for row in args[0][:9]]), expected[:9])


@both
def test_large(op: Op) -> None:
    """Pieces of columns, and several of neurons."""
    for T in (1, 3):
        args = make(Recipe(T=T, d_model=2080, n_experts=520, dtype=torch.bfloat16))
        assert_values(args, op(*args))


@both
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e33])
def test_columns_of_any_size(size: float, op: Op) -> None:
    """Those that integers hold in units of the largest, and those beyond."""
    args = list(make(Recipe(T=2, d_model=200, n_experts=70, bias=False)))
    wanted = op(*args) * size
    for at in (12, 15):
        args[at] = args[at] * size
    args[15][:2] /= size  # of gate and up
    torch.testing.assert_close(op(*args), wanted, rtol=2e-5, atol=2e-6 * float(wanted.abs().max()))


@both
def test_fp64_is_computed_as_fp32(op: Op) -> None:
    args = make(Recipe())
    wide = [a.double() if i in (0, 16) else a for i, a in enumerate(args)]
    assert torch.equal(op(*wide), op(*args).double())


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("T", [1, 3])
@both
def test_a_fault_is_seen(fault: float, T: int, op: Op) -> None:
    args = make(Recipe(T=T))
    args[0][-1, 7] = fault
    y = op(*args)
    assert not y[-1].isfinite().any()
    assert y[:-1].isfinite().all()


@pytest.mark.parametrize("T", [0, 1, 6])
def test_opcheck(T: int) -> None:
    for form in (Recipe(T=T), Recipe(T=T, gated=False, bias=False, dtype=torch.bfloat16)):
        torch.library.opcheck(op.default, make(form))


def test_gradients_are_refused_by_name() -> None:
    x, *rest = make(Recipe())
    with pytest.raises(NotImplementedError, match="tiered_ffn has no gradient; expected ltepass"):
        op(x.requires_grad_(), *rest).sum().backward()
    with torch.no_grad():
        assert not op(x, *rest).requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        op(forward_ad.make_dual(x.detach(), x.detach()), *rest)


def test_vmap_over_x_alone() -> None:
    x, *rest = make(Recipe(T=6))
    assert torch.equal(torch.vmap(lambda x: op(x, *rest))(x.view(2, 3, -1)), op(x, *rest).view(2, 3, -1))


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(T=1, dtype=torch.bfloat16, gated=False)])
def test_without_a_compiler_plain_pytorch_computes_the_same(recipe: Recipe) -> None:
    for some in SHARES:
        args = make(recipe, *some)
        assert_values(args, tiers.definition(*args))
        assert torch.equal(tiers.tiered_ffn(*args), op(*args))


def _wrong() -> dict[str, tuple[int, Any, str]]:
    """Place of an argument, what it becomes, and what both sides say."""
    return {
        "experts of two": (6, lambda t: t[::2], r"router_weight is float32 \[6\]; expected one of each of the 12"),
        "a threshold each": (THRESHOLD, lambda t: t.expand(12), r"threshold is float32 \[12\]; expected float32 \[\]"),
        "a wide floor": (FLOOR, lambda t: t.double(), r"floor is float64 \[\]; expected float32"),
        "codes of down too short": (
            10,
            lambda t: t[..., :16],
            r"down_codes is uint8 \[1, 12, 16\]; expected",
        ),
        "signed multipliers": (
            11,
            lambda t: t.to(torch.int8),
            "down_multipliers is int8",
        ),
        "no low plane of down": (
            13,
            lambda t: t[:2],
            r"low_codes .* expected uint8 \[3, 12, 32\]",
        ),
        "scales in 16 bits": (15, lambda t: t.half(), r"low_scales is float16 \[3, 12\]; expected float32"),
        "a bias in 16 bits": (16, lambda t: t.half(), r"bias is float16 \[60\]; expected float32 \[60\]"),
        "another activation": (17, lambda _: "tanh", "activation"),
    }


@pytest.mark.parametrize("case", _wrong())
def test_what_makes_no_sense_is_refused_in_cpp_and_in_python(case: str) -> None:
    at, change, words = _wrong()[case]
    args = list(make(Recipe()))
    args[at] = change(args[at])
    with pytest.raises(RuntimeError, match=words):
        op(*args)
    with pytest.raises(LTEError, match=words):
        op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))


def all_forms() -> None:
    """Every dtype, activation and width of a tail, without hypothesis."""
    for seed, d_model in enumerate((1, 15, 33, 60, 128, 200, 577)):
        for i, activation in enumerate(reference.ACTIVATIONS):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(seed + i) % 3]
            recipe = Recipe(d_model=d_model, activation=activation, dtype=dtype, seed=seed, n_experts=41)
            for some in (replace(recipe, T=1), replace(recipe, gated=False, bias=False)):
                args = make(some, *SHARES[(seed + i) % len(SHARES)])
                for form in (op, of_packed):
                    assert_values(args, form(*args))


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_that_this_machine_runs(level: str) -> None:
    """Each has loops of its own: with and without sums of products of bytes, of 4, 8 and 16 lanes."""
    code = (
        "from tests.kernels.test_tiers import all_forms; from ltepass.kernels.cpu import build, loading; "
        f"assert loading.load() and build.isa() == {level!r}; all_forms()"
    )
    env = environment(LTEPASS_ISA=level, OMP_NUM_THREADS="2")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
