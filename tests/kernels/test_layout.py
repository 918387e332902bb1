"""Lowering lays weights out for the kernel in place; names, values, files and memory are as before."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import ltepass

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, eos_token_id=None
)


def routed_model() -> PreTrainedModel:
    torch.manual_seed(0)
    model = ltepass.transform(AutoModelForCausalLM.from_config(CONFIG).eval(), config=ltepass.LTEConfig(group_size=8))
    ltepass.set_mode(model, "hard")
    return model


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Bit for bit; a sparsity table that was never calibrated is all NaN."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")


def test_lowering_moves_weights_and_keeps_no_second_copy() -> None:
    model = routed_model()
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.state_dict().items()}
    ltepass.lower(model)
    down = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert down.stride() == (1, down.shape[0])  # a neuron's column lies together
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, (value, _) in before.items():
        assert_same(after[name], value, name)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    ltepass.unlower(model)
    for name, p in model.state_dict().items():
        assert p.stride() == before[name][1], name


def test_a_lowered_model_saves_the_same_files(tmp_path: Path) -> None:
    model = routed_model()
    model.save_pretrained(tmp_path / "before")
    ltepass.lower(model)
    model.save_pretrained(tmp_path / "lowered")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "lowered")]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        assert_same(files[1][name], value, name)
    assert (tmp_path / "before/config.json").read_text() == (tmp_path / "lowered/config.json").read_text()
    assert model.get_parameter("model.layers.0.mlp.down_proj.weight").stride()[0] == 1  # and stays lowered
