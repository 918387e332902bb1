"""A checkpoint is data: what its strings, numbers and tensors say is believed only where the model agrees."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import ltepass
from ltepass.errors import CheckpointError
from ltepass.routed.sites import Refusal
from tests.crafted_checkpoints import CHECKPOINTS, IDS, copied, craft, write
from tests.models import zoo
from tests.typed import lte_state
from tests.watching import MARK, watch

PAYLOADS = [
    f'x") or __import__("os").system("{MARK}") or ("',
    f"x\n        __import__('os').system('{MARK}')\n        self.y",
    f"x.__class__.__init__.__globals__.{MARK}",
    f"x)[__import__('os').system('{MARK}')](",
    f'up_proj") and getattr(__import__("os"), "system")("{MARK}") and ("',  # the one that ran: in the router's name
]
FIELDS = ["router", "owner", "up", "gate", "down", "name", "activation", "kind", "down_bias", "param"]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """A first load imports the rest of transformers, and torch then makes its cache folder."""
    hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "v2/aligned")


@pytest.mark.parametrize("payload", range(len(PAYLOADS)))
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_no_string_of_a_checkpoint_runs(version: str, field: str, payload: int, tmp_path: Path) -> None:
    config = copied(f"{version}/aligned", tmp_path)
    craft(config["quantization_config"]["sites"][0], field, PAYLOADS[payload])
    write(tmp_path, config)
    with watch() as done, pytest.raises(CheckpointError):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS)
    assert not done


def test_the_watch_sees_what_it_is_there_for(tmp_path: Path) -> None:
    with watch() as done:
        exec(compile(f"x = '{MARK}'", "payload", "exec"))
        (tmp_path / "written").write_text("x")
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert {what.split()[0] for what in done} >= {"compile", "open", "subprocess.Popen"}


WRONG: dict[str, tuple[Any, ...]] = {
    "kind": ("hooks", "graph", None, 1, True),
    "activation": ("swish", "custom(" + PAYLOADS[0] + ")", "gelu", 7, None),
    "d_ff": (10**12, 10**40, -60, 0, 59, 60.0, "60", True, None),
    "d_model": (10**12, 23, True),
    "group_size": (0, 7, -5, 5.0, True, 10**12),
    "router": ("model.layers.0.router", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.act_fn", "router", ""),
    "owner": ("model.layers.1.mlp", "model.layers.0", "", "model.layers.0.mlp.up_proj"),
    "up": ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head", "model.layers.0.mlp", ""),
    "gate": (None, "model.layers.0.mlp.up_proj", "model.layers.0.mlp.act_fn"),
    "down": ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"),
    "down_bias": ("model.layers.0.input_layernorm.weight", "model.norm.weight"),
    "name": ("model.layers.1.mlp", "other"),
    "nodes": (["x", "h", "down"], None),
    "up_rows": (1, 2, 3, -1, None, True),
    "gate_rows": (0, 2, None),
    "down_rows": (0, 1, None),
    "up_bias": (0,),
    "parameters": ([], ["lm_head.weight"] * 3, None),
    "neurons": ([], None, [{"parameter": 0, "dim": 0, "start": 0, "step": 1}]),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_site_that_does_not_fit_the_model_is_refused(field: str, tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    for value in WRONG[field]:
        changed = copy.deepcopy(config)
        changed["quantization_config"]["sites"][0][field] = value
        write(tmp_path, changed)
        with pytest.raises(CheckpointError):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_bias_that_its_linear_adds_is_said_to_be_one(tmp_path: Path) -> None:
    config = copied("v2/inline", tmp_path)
    for key in ("up_bias", "down_bias"):
        changed = copy.deepcopy(config)
        changed["quantization_config"]["sites"][0][key] = None
        write(tmp_path, changed)
        with pytest.raises(CheckpointError, match="says nothing of the bias"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_site_may_not_be_listed_twice_or_left_out(tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    first, second = config["quantization_config"]["sites"]
    for sites in ([first], [first, first], [first, second, second], []):
        config["quantization_config"]["sites"] = sites
        write(tmp_path, config)
        with pytest.raises(CheckpointError):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_activation_is_the_one_that_the_forward_computes(tmp_path: Path) -> None:
    """Gated right all the same, and silently wrong as soon as the model is lowered."""
    for name, other in (("aligned", "gelu"), ("inline", "gelu"), ("encoder_decoder", "silu"), ("fused", "relu")):
        config = copied(f"v2/{name}", tmp_path)
        config["quantization_config"]["sites"][0]["activation"] = other
        write(tmp_path, config)
        kind = hf.AutoModelForSeq2SeqLM if name == "encoder_decoder" else hf.AutoModelForCausalLM
        with pytest.raises(CheckpointError, match=other):
            kind.from_pretrained(tmp_path)


def test_up_and_down_that_change_places_are_seen_where_their_shapes_agree(tmp_path: Path) -> None:
    """A forward alone tells them apart, and OPT's cannot be traced: its layers are tried when they are loaded."""
    model = zoo.opt(1, ffn_dim=24, enable_bias=False).eval()
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=6))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (site,) = config["quantization_config"]["sites"]
    site["up"], site["down"] = site["down"], site["up"]
    site["parameters"] = site["parameters"][::-1]
    write(tmp_path, config)
    with pytest.raises(CheckpointError):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_says_which_ltepass_is_needed(tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    config["quantization_config"] |= {"version": 5, "written_by": "0.4.2", "something": "new"}
    write(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"version 5 .* install ltepass 0\.4\.2 or newer"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    config["quantization_config"]["written_by"] = "\x1b[2J"
    write(tmp_path, config)
    with pytest.raises(CheckpointError, match="install a newer one") as error:
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", ["aligned", "inline", "fused"])
def test_the_base_model_can_do_all_that_the_whole_can(name: str, version: str, tmp_path: Path) -> None:
    base = hf.AutoModel.from_pretrained(CHECKPOINTS / version / name)
    whole = hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / version / name)
    with torch.no_grad():
        want = base(IDS).last_hidden_state
        if name != "inline":  # OPT's base model is one level further up
            assert torch.equal(whole.model(IDS).last_hidden_state, want)
        torch.testing.assert_close(ltepass.lower(base)(IDS).last_hidden_state, want)
        ltepass.unlower(base)
        ltepass.calibrate(base, [IDS])
        ltepass.set_mode(base, "hard")
        ltepass.set_sparsity(base, 0.6)
        want = base(IDS).last_hidden_state
        base.save_pretrained(tmp_path)
        assert torch.equal(hf.AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, want)
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)  # with the prefix again, and a new head
        assert torch.equal(again.base_model(IDS).last_hidden_state, want)
    assert [site.down for site in lte_state(again).sites] == [site.down for site in lte_state(whole).sites]


def test_another_head_keeps_the_gates() -> None:
    model = hf.AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / "v2/aligned", num_labels=3)
    assert len(lte_state(model).sites) == 2
    whole = hf.AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "v2/aligned")
    assert torch.equal(model.model(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_text_of_a_checkpoint_reaches_the_terminal_as_text(tmp_path: Path) -> None:
    config = copied("v2/aligned", tmp_path)
    foul = "[/red]\x1b]0;owned\x07[bold]\n\u202etxt"
    keys = ("module", "node", "check", "reason", "nearest")
    config["quantization_config"]["refusals"] = [dict.fromkeys(keys, foul)]
    write(tmp_path, config)
    text = str(ltepass.report(hf.AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert "[/red]" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    assert Refusal(module="m", node="n", check="c", reason="two\nlines").reason == "two lines"
