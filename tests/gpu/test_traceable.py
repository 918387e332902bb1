"""What compilers see of the GPU path, traced with fake CUDA tensors on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ltepass.kernels.gpu import which_path

triton = pytest.importorskip("triton")
OP = torch.ops.ltepass.routed_ffn.default
WRITTEN = {  # per path, what each launch writes; anything else here would be cloned on every call, weights included
    "one": (1, None, [{"plan"}, {"plan", "h"}, {"plan", "partial", "y"}]),
    "union": (8, None, [{"mask", "plan"}, {"plan", "h"}, {"plan", "partial", "y"}]),
    "grouped": (64, 0.1, [{"mask"}, {"tokens", "counts"}, {"h"}]),
    "dense": (64, None, [{"mask"}, {"h"}]),
}


@pytest.fixture(autouse=True)
def _a_gpu_to_compile_for() -> Iterator[None]:
    """torch asks triton's driver for a target to read each kernel's writes from its IR."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    before = driver.__dict__.get("_active")
    driver.set_active(Driver())
    yield
    driver._active = before


def operands(T: int, device: str, cut: bool = False) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    fp32 = torch.float32
    router = (empty(8, 60, dtype=fp32), None, empty(dtype=fp32))
    return (
        empty(T, 60),
        *router,
        empty(240, 60),
        None,
        empty(240, 60),
        None,
        empty(50, 240),
        None,
        "silu",
        *([empty(dtype=fp32)] if cut else []),
    )


def compiled_graph(
    T: int, device: str, density: float | None = None, n_calls: int = 1, cut: bool = False
) -> torch.fx.Graph:
    """The graph that inductor is given for relu(op(...))."""
    mode = FakeTensorMode()
    with mode:
        args = operands(T, device, cut)
        tensors = [a for a in args if isinstance(a, Tensor)]

    def model(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        full = [next(left) if isinstance(a, Tensor) else a for a in args]
        return tuple(torch.relu(OP(*full)) for _ in range(n_calls))

    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    with mode, torch.no_grad(), which_path.assume_density(density):
        gm = make_fx(model, pre_dispatch=True)(*tensors)
        table = select_decomp_table()
        aot_module_simplified(gm, tensors, fw_compiler=keep, inference_compiler=keep, decompositions=table)
    return graphs[0].graph


def launches(graph: torch.fx.Graph) -> list[set[str]]:
    return [set(n.kwargs["tensors_to_clone"]) for n in graph.nodes if "triton_kernel_wrapper" in str(n.target)]


@pytest.mark.parametrize("path", WRITTEN)
@pytest.mark.parametrize("cut", [False, True])
def test_inductor_sees_each_launch_and_what_it_writes(path: str, cut: bool) -> None:
    T, density, written = WRITTEN[path]
    graph = compiled_graph(T, "cuda:0", density, cut=cut)
    assert launches(graph) == written
    assert not [n for n in graph.nodes if "ltepass" in str(n.target)]


def test_a_second_call_has_launches_and_buffers_of_its_own() -> None:
    graph = compiled_graph(1, "cuda:0", n_calls=2)
    assert len(launches(graph)) == 6
    made = [n for n in graph.nodes if n.target is torch.ops.aten.empty.memory_format]
    assert len(made) == 8  # plan, h, y and the parts of y, twice


def test_on_a_cpu_the_op_stays_one_node() -> None:
    graph = compiled_graph(1, "cpu")
    assert [n for n in graph.nodes if n.target is OP]
    assert not launches(graph)


def test_the_traced_path_takes_the_assumed_density() -> None:
    products = [
        sum(n.target is torch.ops.aten.mm.default for n in compiled_graph(64, "cuda:0", p).nodes) for p in (0.1, 0.9)
    ]
    assert products == [1, 3]  # grouped: only down is dense; dense: gate, up and down
