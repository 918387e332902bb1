"""`ltepass.quantize(model, "tiers", text)`: FFNs in two planes of 4 bits, everything else in int8, in one call."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.errors import CalibrationError, ConfigError
from ltepass.routed.routed import Routed, is_transformed
from ltepass.routed.torchao_weights import is_quantised
from tests.models.zoo import Own, build, ids, logits
from tests.stand_in_torchao import put_in_place


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    if importlib.util.find_spec("torchao") is None:  # transformers asks for the package
        monkeypatch.setattr("ltepass.transformers_hook.attach_quantised", lambda model: None)


def coded() -> Any:
    return ltepass.quantize(build("llama"), "tiers", [ids(8, 16)])


def test_it_is_transform_and_int8_in_one_call() -> None:
    config = ltepass.LTEConfig(router="proxy", inactive="low_bit", target_sparsity=0.9)
    by_hand = ltepass.transform(build("llama"), config=config, calibration=[ids(8, 16)])
    ltepass.set_mode(by_hand, "hard")
    assert torch.equal(logits(coded()), logits(ltepass.quantize(by_hand, "int8")))


def test_ffns_are_tiers_in_hard_mode_and_the_rest_is_int8() -> None:
    model = coded()
    routed = Routed.of(model, "the test")
    assert routed.tiered
    assert {router.mode for router in routed.routers} == {"hard"}
    assert is_quantised(model)
    assert (logits(model) - logits(build("llama"))).norm() < 0.2 * logits(build("llama")).norm()


def test_another_sparsity_reads_more_of_both_planes_and_is_nearer() -> None:
    dense, model = logits(build("llama")), coded()
    far = (logits(model) - dense).norm()
    ltepass.set_sparsity(model, 0.2)
    assert (logits(model) - dense).norm() < far


def test_it_saves_loads_and_lowers(tmp_path: Path) -> None:
    model = coded()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(ltepass.lower(loaded)), logits(model), rtol=0.02, atol=0.02)  # inputs of int8


def test_a_module_of_ones_own_takes_its_inputs_from_the_text() -> None:
    model = ltepass.quantize(Own().eval(), "tiers", [ids(8, 16)])
    assert Routed.of(model, "the test").tiered


@pytest.mark.parametrize("text", [None, []])
def test_without_text_it_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="tiers need text"):
        ltepass.quantize(build("llama"), "tiers", text)


def test_routers_are_not_replaced() -> None:
    model = ltepass.transform(build("llama"))
    with pytest.raises(ConfigError, match="the model has routers; expected a dense one"):
        ltepass.quantize(model, "tiers", [ids(8, 16)])


@pytest.mark.parametrize("fault", ["text", "torchao"])
def test_what_fails_half_way_is_undone(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if fault == "text":
        with pytest.raises(CalibrationError):
            ltepass.quantize(model, "tiers", ["no ids"])  # type: ignore[list-item]
    else:
        monkeypatch.setattr("ltepass.quantise_weights._round", lambda *_: (_ for _ in ()).throw(RuntimeError("fault")))
        with pytest.raises(RuntimeError, match="fault"):
            ltepass.quantize(model, "tiers", [ids(8, 16)])
    assert not is_transformed(model)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert after.keys() == before.keys()
