"""Killed, resumed, distributed, checkpointed, in low precision: the same weights or the same gradients."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ltepass.errors import TrainingError
from ltepass.routed.routed import routers_of
from ltepass.training.auxiliary_loss import take_auxiliary
from ltepass.training.checkpoints import last_complete, mark_complete
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage
from tests.child import environment
from tests.training.kill_driver import CASES
from tests.training.learning_cases import copied_text, fit, trained
from tests.typed import present

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "11_two_processes.py"
RANDOM = ("random 0", "random 1")
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19)


def drive(driver: str, folder: Path, *args: str, timeout: float = 240) -> str:
    """What the driver said on stderr."""
    env = environment(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-m", f"tests.training.{driver}", str(folder), *args],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """By case, and of two runs that were killed at random moments: of one process, so that `whole` is trained once."""
    folder = tmp_path_factory.mktemp("killed")
    drive("kill_driver", folder, "2")
    return {name: torch.load(folder / name / "final.pt") for name in (*CASES, *RANDOM)}


@pytest.mark.parametrize("case", [*(name for name in CASES if name != "whole"), *RANDOM])
def test_killed_training_resumes_to_bitwise_the_same_weights(ends: Any, case: str) -> None:
    whole = ends["whole"]
    assert whole.keys() == ends[case].keys()
    for name, value in whole.items():
        assert torch.equal(value.nan_to_num(), ends[case][name].nan_to_num()), name


@pytest.mark.slow
@pytest.mark.timeout(5000)  # beyond the driver's, which says what it was doing
def test_killed_at_random_moments_the_same_call_ends_with_the_same_weights(tmp_path: Path) -> None:
    n = 20
    drive("kill_driver", tmp_path, str(n), timeout=600 + 200 * n)  # two trainings for each, on a loaded machine
    whole = torch.load(tmp_path / "whole" / "final.pt")
    for i in range(n):
        ended = torch.load(tmp_path / f"random {i}" / "final.pt")
        assert whole.keys() == ended.keys()
        assert all(torch.equal(value.nan_to_num(), ended[name].nan_to_num()) for name, value in whole.items()), i


def test_a_checkpoint_that_was_cut_short_is_not_taken(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        mark_complete(tmp_path / f"checkpoint-{step}", {})
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.fixture(scope="module", params=["linear", pytest.param("proxy", marks=pytest.mark.slow)])
def distributed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("distributed")
    drive("distributed_driver", folder, request.param)
    return {file.stem: torch.load(file) for file in folder.glob("*.pt")}


def test_two_processes_give_the_gradients_of_one(distributed: Any) -> None:
    assert_close(distributed["single"], distributed["ddp"], 1e-5)


def test_shards_give_the_gradients_of_one_or_torch_refuses_a_scalar(distributed: Any) -> None:
    """A proxy's bias is one number, which fully_shard takes no part of: it says so before it changes anything."""
    refused = [name for name in distributed["fsdp"] if "fully_shard doesn't support scalar parameters" in name]
    assert bool(refused) == (distributed["rank0"]["0.bias"].dim() == 0)
    if not refused:
        assert_close(distributed["single"], distributed["fsdp"], 1e-5)


def test_two_processes_end_a_fit_with_bitwise_the_same_routers(distributed: Any) -> None:
    first, second = distributed["rank0"], distributed["rank1"]
    assert first.keys() == second.keys()
    assert any("cut" in name for name in first)
    assert len(first["log"]) == 2  # sparsity and perplexity
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_two_processes_share_the_gradients_of_what_each_stage_adds(distributed: Any) -> None:
    """DDP knows the parameters that learned when it was made: it is made anew for a stage."""
    first, second = distributed["adapted0"], distributed["adapted1"]
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_two_processes_end_a_fit_where_one_does(distributed: Any) -> None:
    """At the same global batch, and settled on the same held-out batches."""
    assert_ended(distributed["alone"], distributed["rank0"])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(
            "alone",
            "loaded",
            marks=pytest.mark.skipif(OLD, reason="transformers before 5.19: its Trainer takes no shards"),
        ),
        ("looped1", "looped2"),
    ],
)
def test_two_processes_of_half_the_weights_end_a_fit_where_one_does(one: str, two: str, distributed: Any) -> None:
    """FSDP2, by the Trainer of a model that `from_pretrained` shards, and by a loop of one's own."""
    if distributed["rank0"]["0.bias"].dim() == 0:
        assert any("scalar" in name for name in distributed[two])
    else:
        assert_ended(distributed[one], distributed[two])


@pytest.mark.skipif(not OLD, reason="the Trainer takes shards from transformers 5.19 on")
def test_an_older_trainer_refuses_shards_and_names_the_version_that_takes_them(distributed: Any) -> None:
    if distributed["rank0"]["0.bias"].dim() == 0:
        pytest.skip("fully_shard takes no scalars")
    (refusal,) = distributed["loaded"]
    assert "which trains from transformers 5.19 on" in refusal
    assert f"{transformers.__version__} is installed" in refusal


def test_tensor_parallelism_is_refused_by_name(distributed: Any) -> None:
    (refusal,) = distributed["split"]
    assert "split over 2 processes" in refusal
    assert "load it without tp_plan" in refusal


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    more = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [*command, *more, str(EXAMPLE), str(tmp_path)], check=True, env=environment(OMP_NUM_THREADS="1"), timeout=600
    )
    two = torch.load(tmp_path / "thresholds.pt")
    one = runpy.run_path(str(EXAMPLE))["train"](tmp_path, 1)
    assert one.keys() == two.keys()
    assert all(abs(two[name] - threshold) < 1e-5 for name, threshold in one.items())


def assert_ended(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert any("threshold" in name for name in one)
    for name, value in one.items():
        assert (two[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp_min(1.0), name


def assert_close(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], tolerance: float) -> None:
    assert expected.keys() == got.keys()
    assert any("router" in name for name in expected)
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


def gradients(
    *,
    checkpointing: bool = False,
    autocast: bool = False,
    rounded: bool = False,
    mode: str = "soft",
    lam: float = 0.5,
) -> dict[str, torch.Tensor]:
    """rounded: all in fp32, but each router sees its input as bf16 has it."""
    model, x = trained(), copied_text(8, 3)
    if rounded:
        for router in routers_of(model):
            router.register_forward_pre_hook(lambda _, args: (args[0] + (args[0].bfloat16() - args[0]).detach(),))
    begin_stage(model, "soft")
    model.train()
    if mode == "dense":
        import ltepass

        ltepass.set_mode(model, "dense")
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its new name
        enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=x, labels=x).loss
        if mode == "soft":
            aux = take_auxiliary(model, None)
            loss = loss + (0.3 * aux.efficiency + lam * aux.separability) / aux.tokens
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_non_reentrant_checkpointing_gives_the_same_gradients() -> None:
    assert_close(gradients(), gradients(checkpointing=True), 1e-5)


def relative_error(exact: dict[str, torch.Tensor], rough: dict[str, torch.Tensor]) -> float:
    """Of the whole gradient."""
    assert exact.keys() == rough.keys()
    missed = sum(float((rough[n].float() - g).square().sum()) for n, g in exact.items())
    return float((missed / sum(float(g.square().sum()) for g in exact.values())) ** 0.5)


def test_autocast_costs_the_soft_stage_no_more_than_it_costs_the_dense_model() -> None:
    """bf16 autocast, with routers and without; the separability loss is the next test's."""

    def error(mode: str) -> float:
        return relative_error(gradients(mode=mode, lam=0.0), gradients(mode=mode, lam=0.0, autocast=True))

    dense = error("dense")
    assert 0 < error("soft") < 1.5 * dense
    model = trained()
    begin_stage(model, "soft")
    with torch.autocast("cpu", torch.bfloat16):
        model(copied_text(1, 3))
    assert all(part.dtype == torch.float32 for r in routers_of(model) for part in present(r.recorder.calls[-1].losses))


def test_autocast_costs_separability_no_more_than_rounded_inputs_do() -> None:
    """Near the clamp its gradient is as steep as 6 / clamp^4, and jumps to nothing at the edge: what bf16 does to the
    routers' inputs alone, everything else exact, moves it that much too."""
    exact = gradients()
    inputs_only = relative_error(exact, gradients(rounded=True))
    assert inputs_only > 0.01
    assert relative_error(exact, gradients(autocast=True)) < 3 * inputs_only


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(tmp_path: Path) -> None:
    model = trained()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.lm_head.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="gradient is not finite"):
        fit(model, tmp_path, LTESettings(soft_steps=3, hard_steps=0))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert (tmp_path / "soft" / "last-good" / "model.safetensors").exists()
