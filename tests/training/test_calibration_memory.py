"""Calibration of a model that fills the memory: sums of a few FFNs at a time, samples once, weights on disk."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import ltepass
from examples.bench import big_model
from ltepass.calibration.ridge import RidgeSums
from ltepass.errors import LoweringError, MetaWeightsError
from ltepass.routed import samples
from ltepass.routed.routed import Routed
from ltepass.routed.samples import collect
from tests.models.zoo import build, ids, logits
from tests.typed import lte_state, routed

BATCHES = [ids(4, 24)]


def calibrated(model: nn.Module, **config: Any) -> nn.Module:
    """In hard mode, neurons in the order that the model has."""
    settings: dict[str, Any] = {"group_size": 5, "grouping": "identity", **config}
    ltepass.transform(model, config=ltepass.LTEConfig(**settings), calibration=BATCHES)
    ltepass.set_mode(model, "hard")
    return model


def test_sums_of_as_many_ffns_as_fit_are_kept_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, most = WeakSet[RidgeSums](), [0]
    add = RidgeSums.add

    def counted(self: RidgeSums, x: torch.Tensor, y: torch.Tensor) -> None:
        alive.add(self)
        most[0] = max(most[0], len(alive))
        add(self, x, y)

    monkeypatch.setattr(RidgeSums, "add", counted)
    together = calibrated(build("llama", layers=3)).state_dict()
    assert most == [3]
    monkeypatch.setattr(samples, "BUDGET_BYTES", 1)
    most[0] = 0
    apart = calibrated(build("llama", layers=3)).state_dict()
    assert most == [1]
    assert all(torch.equal(value, apart[name]) for name, value in together.items())


def test_a_sample_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[samples._Collector] = []
    sample = samples._Collector.sample

    def noted(self: samples._Collector) -> samples.Sample:
        made.append(self)
        return sample(self)

    monkeypatch.setattr(samples._Collector, "sample", noted)
    collect(Routed.of(calibrated(build("llama")), "test"), BATCHES)
    assert len(made) == 2
    assert not any(collector.x or collector.h for collector in made)


def half_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    """The second layer's weights are in the folder, and no part of the model's memory."""
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    where = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    made: nn.Module = dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    assert any(p.is_meta for p in made.parameters())
    return made


CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "one budget": {"budget": "model"},
    "proxy": {"router": "proxy", "group_size": "auto"},
}
SLOW = ("one budget", "proxy")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CONFIGS])
def test_weights_on_disk_calibrate_as_those_in_memory_do(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    expected = logits(calibrated(build("llama"), **config))
    model = calibrated(half_on_disk(build("llama"), tmp_path), **config)
    assert torch.equal(logits(model), expected)
    assert any(p.is_meta for p in model.parameters())  # nothing that was fetched has stayed
    with pytest.raises(LoweringError, match="offload"):
        ltepass.lower(model)


def test_neurons_on_disk_keep_their_order_and_that_is_said(tmp_path: Path) -> None:
    dense = logits(build("llama").eval())
    model = half_on_disk(build("llama").eval(), tmp_path)
    with pytest.warns(UserWarning, match=r"1 FFNs keep the order.*layers\.1\.mlp.*offloaded"):
        calibrated(model, grouping="output_aware")
    ltepass.set_mode(model, "dense")
    torch.testing.assert_close(logits(model), dense)
    first, second = (router.permutation for router in routed(model).routers)
    assert not torch.equal(first, torch.arange(len(first)))
    assert torch.equal(second, torch.arange(len(second)))
    assert lte_state(model).grouping != "output_aware"  # a later call groups what can be


def test_weights_that_nothing_fetches_are_refused_by_name() -> None:
    model = build("llama")
    ltepass.transform(model)
    model.get_submodule("model.layers.1.mlp.up_proj").to("meta")
    with pytest.raises(MetaWeightsError, match=r"layers\.1\.mlp\.up_proj"):
        ltepass.calibrate(model, BATCHES)


def test_routers_on_disk_are_not_calibrated(tmp_path: Path) -> None:
    model = build("llama")
    ltepass.transform(model)
    with pytest.raises(MetaWeightsError, match=r"layers\.1\.mlp\.router"):
        ltepass.calibrate(half_on_disk(model, tmp_path), BATCHES)


@pytest.mark.parametrize("disk", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_command_measures_each_step(disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m examples.bench.big_model`, whose 7B shape takes 16 GB and half an hour."""
    monkeypatch.setitem(big_model.SHAPES, "small", (64, 96, 2, 128))
    with pytest.warns(UserWarning, match="keep the order") if disk else nullcontext():
        steps = big_model.measure("small", 40, tmp_path if disk else None)
    assert [step.step for step in steps] == ["load", "transform", "calibrate", "lower", "generate"]
    assert all(step.peak_gb >= step.now_gb > 0 for step in steps)
