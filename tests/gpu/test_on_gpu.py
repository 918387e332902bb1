"""What only a GPU can show: right against float64, no host sync, graphs, repeatable bits, streams, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from ltepass.errors import LTEError
from ltepass.kernels import reference
from ltepass.kernels.gpu import tuning, which_path
from tests.gpu import ffn_cases
from tests.gpu.ffn_cases import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FP32_LIMIT = 2e-6
FACTOR_16_BIT = 1.3  # times PyTorch's own error, dense and masked in the same dtype
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (tokens, calibrated density) for each path
PATHS = {"one": (1, None), "union 16": (7, None), "union 32": (29, 0.05), "grouped": (200, 0.2), "dense": (200, None)}
OP = torch.ops.ltepass.routed_ffn
OP_WITH_MASK = torch.ops.ltepass.routed_ffn_with_mask


@pytest.fixture(autouse=True)
def _forget_densities() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    with which_path.assume_density(None):
        yield


def operands(case: Case, density: float | None = None) -> tuple[Any, ...]:
    args = ffn_cases.make(case, "cuda")
    which_path._assumed.set(density)  # until the end of the test
    return args


def check(case: Case, density: float | None = None) -> None:
    args = operands(case, density)
    y, mask, count = OP_WITH_MASK(*args)
    assert torch.equal(y, OP(*args))
    assert torch.equal(mask, reference.mask(*args[:4]))
    assert int(count) == int(mask.sum())
    ours, torchs = ffn_cases.errors(y, args)
    assert ours <= (FP32_LIMIT if case.dtype == torch.float32 else FACTOR_16_BIT * torchs), (case, ours, torchs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "fused", "neuron"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_against_float64(dtype: torch.dtype, layout: str, path: str) -> None:
    T, density = PATHS[path]
    check(Case(T=T, dtype=dtype, layout=layout, d_model=255, n_experts=21, group_size=24, d_out=130), density)


def test_shapes_that_no_path_can_make_sense_of_are_refused() -> None:
    args = list(operands(Case(T=2)))
    args[8] = args[8][:, 1:]
    for op in (OP, OP_WITH_MASK):
        with pytest.raises(LTEError, match="d_out, d_ff"):
            op(*args)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(activation: str, gated: bool) -> None:
    for T, density in PATHS.values():
        check(Case(T=T, activation=activation, gated=gated, bias=not gated, d_model=96, group_size=16), density)


@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 100, 128])
def test_every_group_size(group_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for T, density in PATHS.values():
            check(Case(T=T, dtype=dtype, group_size=group_size, d_model=320, n_experts=10, d_out=320), density)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "neuron"])
def test_hidden_units_up_to_a_cut_are_left_out(path: str, layout: str) -> None:
    T, density = PATHS[path]
    check(Case(T=T, layout=layout, cut=0.6), density)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("active", [0.0, 1.0])
def test_no_expert_and_all_experts(path: str, active: float) -> None:
    T, density = PATHS[path]
    check(Case(T=T, density=active), density)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["one", "union 32", "dense"])
def test_decisions_are_fp32_decisions(path: str, dtype: torch.dtype) -> None:
    """Logits near 10 and 1e-4 from the threshold: a router weight in bf16 or tf32 would be 3e-2 or 4e-3 off."""
    T, density = PATHS[path]
    T = min(T, 37)
    check(Case(T=T, dtype=dtype, n_experts=60, group_size=1, d_out=30, margin=1e-4, seed=2), density)


LARGE: dict[str, Any] = {
    "d_model": 4096,
    "n_experts": 344,
    "group_size": 32,
    "d_out": 4096,
    "dtype": torch.bfloat16,
    "margin": 1e-3,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["rows", "neuron"])
def test_a_7b_ffn_is_right_and_repeats_bit_for_bit(path: str, layout: str) -> None:
    T, density = PATHS[path]
    case = Case(T=T, layout=layout, density=0.2, **LARGE)
    args = operands(case, density)
    first = OP(*args)
    ours, torchs = ffn_cases.errors(first, args)
    assert ours <= FACTOR_16_BIT * torchs
    noise = torch.empty(64 * 2**20, device="cuda")
    for _ in range(20):
        noise.normal_()  # other work in between, and other contents of the memory that buffers come from
        assert torch.equal(OP(*args), first)


@pytest.mark.parametrize("path", PATHS)
def test_no_call_waits_for_the_device(path: str) -> None:
    T, density = PATHS[path]
    args = operands(Case(T=T), density)
    OP(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OP(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", PATHS)
def test_a_graph_replays_with_other_inputs_and_other_counts(path: str) -> None:
    T, density = PATHS[path]
    args = operands(Case(T=T, n_experts=30, margin=1e-3), density)
    OP(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OP(*args)
    for seed, threshold in ((1, -100.0), (2, 0.0), (3, 3.0), (4, 100.0)):
        x = ffn_cases.make(Case(T=T, n_experts=30, seed=seed, margin=1e-3), "cuda")[0]
        args[0].copy_(x)
        args[3].fill_(threshold)
        y.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(y, reference.routed_ffn(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="launches overlap on Hopper"
)
def test_overlapping_launches_wait_for_what_they_read() -> None:
    """A product, then the op twice, replayed: with programmatic launches the bits are those without."""
    args = operands(Case(T=1, **LARGE))
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    source = args[0].clone()

    def chain() -> Tensor:
        once: Tensor = OP(torch.nn.functional.linear(source, weight), *args[1:])
        twice: Tensor = OP(once / once.norm() * 64, *args[1:])
        return twice

    def replayed() -> list[Tensor]:
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
        found = []
        for seed in range(20):
            source.normal_(generator=torch.Generator("cuda").manual_seed(seed))
            graph.replay()
            found.append(y.clone())
        return found

    expected = replayed()
    kernels = ("router_one", "gate_up_one", "down_one")
    try:
        for name in kernels:
            launch = tuning.launch_for(name, tuning.device_name(source.device), 16, 32)
            tuning.override(replace(launch, blocks={**launch.blocks, "PDL": 1}), name)
        assert all(torch.equal(a, b) for a, b in zip(replayed(), expected, strict=True))
    finally:
        for name in kernels:
            tuning.override(None, name)


def test_the_current_stream_is_used_and_two_streams_do_not_meet() -> None:
    args = operands(Case(n_experts=300, d_model=512, d_out=512))
    expected = OP(*args)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results: list[list[Tensor]] = [[] for _ in streams]
    for _ in range(25):
        for stream, found in zip(streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(OP(*args))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for found in results for y in found)
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(200_000_000)
        OP(*args)
        assert not streams[0].query()  # the call waits behind the sleep, as only this stream's work does
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    args = ffn_cases.make(Case(), "cuda:1")
    assert torch.cuda.current_device() == 0
    assert ffn_cases.errors(OP(*args), args)[0] <= FP32_LIMIT


@pytest.mark.parametrize("path", PATHS)
def test_no_second_copy_of_the_weights(path: str) -> None:
    T, density = PATHS[path]
    args = operands(Case(T=T, density=0.2, **LARGE), density)
    OP(*args)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OP(*args)
    torch.cuda.synchronize()
    # The three weights are 270 MB; cuBLAS may take 32 for itself.
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path: str) -> None:
    T, density = PATHS[path]
    args = operands(Case(T=T), density)
    expected = OP(*args)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(OP(*args), expected)


@pytest.mark.parametrize("path", ["one", "union 16", "grouped"])
def test_offsets_past_two_to_the_31(path: str) -> None:
    T, density = PATHS[path]
    args = list(operands(Case(T=T, dtype=torch.float16, n_experts=3, group_size=4, d_out=11), density))
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    far = torch.empty(12 * 2**28, dtype=torch.float16, device="cuda")
    small = OP(*args)
    for start, weight in ((0, 4), (100, 6), (200, 8)):
        rows = far.as_strided(args[weight].shape, (2**28, 1), start)
        args[weight] = rows.copy_(args[weight])
    torch.testing.assert_close(OP(*args), small, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_is_eager(path: str, mode: str) -> None:
    T, density = PATHS[path]
    args = operands(Case(T=T, d_model=128, d_out=128), density)
    tensors = [a for a in args if isinstance(a, Tensor)]

    def model(*given: Tensor) -> Tensor:
        left = iter(given)
        full = [next(left) if isinstance(a, Tensor) else a for a in args]
        return torch.relu(OP(*full)) * 2

    torch._dynamo.reset()
    with torch.no_grad(), which_path.assume_density(density):
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            y = compiled(*tensors).clone()
        torch.testing.assert_close(y, model(*tensors), rtol=1e-5, atol=1e-5)
        args[3].fill_(2.0)  # another count, no recompile
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(*tensors), model(*tensors), rtol=1e-5, atol=1e-5)


def test_inductor_launches_three_kernels_for_a_token() -> None:
    args = operands(Case(d_model=128, d_out=128, dtype=torch.bfloat16))
    tensors = [a for a in args if isinstance(a, Tensor)]

    def model(*given: Tensor) -> Tensor:
        left = iter(given)
        out: Tensor = OP(*[next(left) if isinstance(a, Tensor) else a for a in args])
        return out

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        compiled(*tensors)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(*tensors)
            torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == DeviceType.CUDA]
    assert len(kernels) == 3, kernels
