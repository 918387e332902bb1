"""Choices are looked up, from host values only."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ltepass.kernels.gpu import tuning, which_path
from ltepass.passes.lower import compile_backend
from ltepass.routed.router import Router
from tests.typed import present

KERNELS = {row.kernel for row in tuning.table()}


def test_every_kernel_has_a_row_for_any_device_dtype_and_group() -> None:
    for kernel in KERNELS:
        for bits in (16, 32):
            launch = tuning.launch_for(kernel, "a GPU nobody has seen", bits, 43)
            assert launch.blocks, kernel
            assert all(v > 0 or k in ("TF32", "PDL") for k, v in launch.blocks.items())


def test_the_last_row_that_fits_wins(tmp_path: Path) -> None:
    row_text = "down_one,H100,16,32,BLOCK_O=8 BLOCK_K=32 PROGRAMS=7 STAGES=2 PDL=1,8,2,9.1,H100 once\n"
    path = tmp_path / "table.csv"
    path.write_text(tuning.TABLE.read_text() + row_text)
    row = tuning.table(path)[-1]
    assert (row.blocks["PROGRAMS"], row.num_warps, row.microseconds, row.where) == (7, 8, "9.1", "H100 once")
    assert row.fits("NVIDIA H100 80GB HBM3", 16, 32)
    assert not row.fits("NVIDIA H200", 16, 32)
    assert not row.fits("NVIDIA H100 80GB HBM3", 32, 32)
    assert not row.fits("NVIDIA H100 80GB HBM3", 16, 64)


def test_a_measurement_names_its_machine() -> None:
    for row in tuning.table():
        assert row.where == "not measured" or row.microseconds, row
        assert row.where, row


@pytest.mark.parametrize(
    ("tokens", "density", "path"),
    [
        (1, None, "one"),
        (1, 1.0, "one"),
        (2, None, "union"),
        (16, 1.0, "union"),
        (17, 0.1, "union"),
        (17, 0.5, "dense"),
        (32, None, "dense"),
        (33, 0.2, "grouped"),
        (33, 0.5, "dense"),
        (2048, None, "dense"),
    ],
)
def test_path(tokens: int, density: float | None, path: str) -> None:
    assert which_path.choose_path(tokens, density, tuning.launch_for("paths", "cpu", 16, 32)) == path


def test_a_density_is_assumed_in_a_block_and_in_no_other_thread() -> None:
    with which_path.assume_density(0.5):
        assert which_path.assumed_density() == 0.5
        with ThreadPoolExecutor(1) as other:
            assert other.submit(which_path.assumed_density).result() is None
    assert which_path.assumed_density() is None


def test_a_router_knows_its_density_wherever_it_comes_from(tmp_path: Path) -> None:
    """By no address: a router that is freed leaves its number to nobody."""
    router = Router(8, 24, 4)
    assert router.density is None
    router.quantiles.copy_(torch.linspace(-1, 1, 101))
    router.threshold.fill_(0.5)
    router.note_density()
    told = router.density
    assert told == pytest.approx(0.25, abs=0.01)
    loaded = Router(8, 24, 4)
    loaded.load_state_dict(router.state_dict())
    assigned = Router(8, 24, 4, device="meta")
    assigned.load_state_dict(router.state_dict(), assign=True)
    torch.save(router, tmp_path / "router")
    pickled = torch.load(tmp_path / "router", weights_only=False)
    for one in (loaded, assigned, pickled, copy.deepcopy(router), router.to(torch.float64), router.to("cpu")):
        assert one.density == told
        assert compile_backend._density([one.weight, one.threshold]) == told


def test_an_ffn_on_a_gpu_is_told_the_density_of_its_router(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltepass.passes.lower import lowered_forward

    seen: list[float | None] = []

    def noted(x: Any, *_: Any) -> Any:
        seen.append(which_path.assumed_density())
        return x

    monkeypatch.setattr(lowered_forward, "routed_ffn", noted)
    router = Router(8, 24, 4)
    router.plan = lowered_forward.Plan(
        activation="relu", d_ff=24, up=None, gate=None, up_bias=None, gate_bias=None, down_transposed=False
    )
    router.density = 0.3

    class OnGPU:
        is_cuda = True

    for x in (OnGPU(), torch.zeros(1, 8)):
        lowered_forward.lowered_call(router, router.weight, None, None, None, router.weight, None, x)  # type: ignore[arg-type]
    assert seen == [0.3, None]


def test_an_override_lasts_until_it_is_taken_back() -> None:
    before = tuning.launch_for("router_one", "cpu", 16, 32)
    tuning.override(tuning.table()[0], "router_one")
    assert tuning.launch_for("router_one", "cpu", 16, 32) is tuning.table()[0]
    tuning.override(None, "router_one")
    assert tuning.launch_for("router_one", "cpu", 16, 32) == before


@pytest.mark.parametrize("budget", ["layer", "model"])
def test_a_model_tells_its_densities_and_the_backend_assumes_them(budget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import ltepass
    from ltepass.routed.routed import routers_of

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).eval()
    ids = torch.randint(0, 64, (2, 16))
    if budget == "model":  # the second FFN matters less to the loss than the first
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(0.2)
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=8, budget=budget), calibration=[ids])
    ltepass.set_mode(model, "hard")
    for sparsity in (0.2, 0.7):
        ltepass.set_sparsity(model, sparsity)
        told = [present(r.density) for r in routers_of(model)]
        measured = ltepass.measure_sparsity(model, [ids]).values()
        assert told == pytest.approx([1 - s for s in measured], abs=0.06)
        assert (abs(told[0] - told[1]) > 0.1) == (budget == "model")

    assumed: list[float | None] = []
    assume = which_path.assume_density

    def noted(density: float | None) -> Any:
        assumed.append(density)
        return assume(density)

    monkeypatch.setattr(which_path, "assume_density", noted)
    torch._dynamo.reset()  # what other tests compiled of the same classes may split the model into more graphs
    with torch.no_grad():
        torch.compile(model, backend="lte")(ids)
    assert assumed == pytest.approx([sum(told) / 2])
