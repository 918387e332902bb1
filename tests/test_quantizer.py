"""save_pretrained and from_pretrained give back the same model; what is corrupt or foreign is refused by name."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import ltepass
from ltepass.config import Mode
from ltepass.errors import CheckpointError
from ltepass.routed.routed import routers_of, state_of
from ltepass.routed.router import Router
from tests.child import environment
from tests.models.zoo import build, made_once

IDS = torch.arange(3, 24)[None]
FAMILIES = ("llama", "phi3", "gpt_neox", "opt")


@made_once
def transformed(family: str = "llama", mode: Mode = "hard") -> Any:
    model = build(family)
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=5, grouping="random", seed=1))
    for i, router in enumerate(routers_of(model)):
        router.threshold.fill_(0.1 * i)
        router.quantiles.copy_(torch.linspace(-1, 1, len(router.quantiles)))
        router.mode = mode
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    transformed().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_bit_equal_with_no_key_missing_or_unexpected(family: str, tmp_path: Path) -> None:
    model = transformed(family)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(model), logits(again))
    assert {router.mode for router in routers_of(again)} == {"hard"}
    for ours, theirs in zip(routers_of(model), routers_of(again), strict=True):
        for name, buffer in ours.named_buffers():
            assert torch.equal(buffer, theirs.get_buffer(name)), name
    assert state_of(again) == state_of(model)


def test_hard_mode_is_what_was_compared(saved: Path) -> None:
    """The comparison above means something: the gate changes the logits."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    hard = logits(model)
    for router in routers_of(model):
        router.mode = "dense"
    assert not torch.equal(hard, logits(model))


def test_files_are_safetensors_and_keep_the_dense_names(saved: Path) -> None:
    assert sorted(path.suffix for path in saved.iterdir()) == [".json", ".json", ".md", ".safetensors"]
    names = set(load_file(saved / "model.safetensors"))
    dense = set(build("llama").state_dict())
    assert names > dense
    assert all(".router." in name for name in names - dense)
    entry = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "lte"
    assert len(entry["sites"]) == 2


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad(): total = model(input_ids=torch.arange(3, 24)[None]).logits.double().sum().item()
print(total, "ltepass" in sys.modules)
"""


def loaded(saved: Path, metadata: Path, first: str, autoload: str) -> tuple[float, bool]:
    """(sum of the logits, whether ltepass was imported) of a new process that begins with an import."""
    about = metadata / "ltepass-9.dist-info"  # as an install writes it; before all others on the path
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ltepass\nVersion: 9\n")
    (about / "entry_points.txt").write_text("[torch.backends]\nlte = ltepass_autoload:install\n")
    env = environment(TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    env["PYTHONPATH"] = os.pathsep.join([str(metadata), env["PYTHONPATH"]])
    command = [sys.executable, "-c", f"import {first}\n{LOAD}", str(saved)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    total, ours = done.stdout.splitlines()[-1].split()
    return float(total), ours == "True"


def test_with_autoload_switched_off_transformers_loads_the_dense_model(saved: Path, tmp_path: Path) -> None:
    total, ours = loaded(saved, tmp_path, "transformers", "0")
    assert not ours
    assert total == pytest.approx(logits(transformed(mode="dense")).double().sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("first", "autoload"), [("transformers", "1"), ("transformers.quantizers.auto", "1"), ("ltepass", "0")]
)
def test_a_new_process_loads_a_folder_by_its_name(saved: Path, tmp_path: Path, first: str, autoload: str) -> None:
    """transformers imports torch before its table of methods; the second order has torch imported by the table."""
    total, ours = loaded(saved, tmp_path, first, autoload)
    assert ours
    expected = logits(AutoModelForCausalLM.from_pretrained(saved)).double().sum().item()
    assert total == pytest.approx(expected, rel=1e-6)


def test_a_config_that_built_several_models_is_left_alone() -> None:
    config = build("llama").config
    model, other = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    ltepass.transform(model, config=ltepass.LTEConfig(grouping="identity"))
    assert not hasattr(other.config, "quantization_config")
    assert model.config.quantization_config.quant_method == "lte"
    assert model.model.config is model.config, "settings such as use_cache still reach every part"


def test_bf16_keeps_routers_and_tables_in_fp32(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    reference = list(routers_of(transformed()))
    for router, ours in zip(routers_of(model), reference, strict=True):
        assert torch.equal(router.weight, ours.weight)
        assert torch.equal(router.quantiles, ours.quantiles)
        assert router.permutation.dtype == torch.int64


def test_shards_and_device_map(tmp_path: Path) -> None:
    model = transformed()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")))


def test_the_base_model_loads_without_its_head(saved: Path) -> None:
    base = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        hidden = base(input_ids=IDS).last_hidden_state
        expected = transformed().model(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_loaded_model_saves_on_its_own(copy_of: Any, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    twin = copy_of(model)
    ltepass.remove(model)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(twin), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_loaded_models_cast_move_and_train_like_plain_ones(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("how", ["dequantize", "remove"])
def test_back_to_dense(how: str, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    if how == "dequantize":
        model.dequantize()
    else:
        ltepass.remove(model)
    assert not any(isinstance(module, Router) for module in model.modules())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(saved / "model.safetensors").keys()
        - {n for n in load_file(saved / "model.safetensors") if "router" in n}
    )
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_a_lowered_model_saves_the_same_files(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    ltepass.lower(model)
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(saved / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "config.json").read_text() == (saved / "config.json").read_text()


def changed(saved: Path, folder: Path, change: Any) -> Path:
    """A copy of the checkpoint with `change` applied to the parsed config.json."""
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


BROKEN = {
    "version 99": lambda c: c["quantization_config"].update(version=99),
    "KeyError: 'sites'": lambda c: c["quantization_config"].pop("sites"),
    "TypeError": lambda c: c["quantization_config"]["sites"][0].update(colour="red"),
    "group_size is -3": lambda c: c["quantization_config"]["config"].update(group_size=-3),
    r"60 neurons in model.layers.0.mlp.\w+.weight": lambda c: c.update(intermediate_size=30),
    "no such parameter": lambda c: c.update(num_hidden_layers=1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_corrupt_config_is_refused(message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(changed(saved, tmp_path, BROKEN[message]))


def test_a_foreign_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    """A dense file beside our config: transformers alone would start the routers at random and only warn."""
    changed(saved, tmp_path, lambda _: None)
    tensors = load_file(saved / "model.safetensors")
    dense = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.router" not in name}
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 of them \(first: model.layers.1.mlp.router\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(saved: Path, tmp_path: Path) -> None:
    changed(saved, tmp_path, lambda _: None)
    data = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_lte_config_for_a_dense_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    dense = changed(saved, tmp_path, lambda c: c.pop("quantization_config"))
    config = transformed().config.quantization_config
    with pytest.raises(CheckpointError, match="holds no routers"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
