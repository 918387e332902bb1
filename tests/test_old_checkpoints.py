"""Folders that earlier versions wrote load for ever, and compute what they computed; see checkpoints/write.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import ltepass
from ltepass.routed.routed import routers_of, state_of

FOLDERS = sorted(path for path in (Path(__file__).parent / "checkpoints").glob("v*/*") if path.is_dir())


def load(folder: Path) -> Any:
    kind = hf.AutoModelForSeq2SeqLM if folder.name == "encoder_decoder" else hf.AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, **decoder).logits
        return out


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_an_old_folder_computes_what_it_computed(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = load(folder)
    # Another machine may add up in another order; a lost gate, permutation or threshold shows far above this.
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], rtol=1e-4, atol=1e-5)
    for i, router in enumerate(routers_of(model)):
        assert torch.equal(router.permutation, expected[f"permutation.{i}"])
    model.save_pretrained(tmp_path)  # and what is saved again is the same model in today's format
    again = (type(model)).from_pretrained(tmp_path)
    assert torch.equal(logits(again, expected["ids"]), logits(model, expected["ids"]))
    assert state_of(again) == state_of(model)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_an_old_folder_can_be_used(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = load(folder)
    want = logits(model, expected["ids"])
    ltepass.set_sparsity(model, 0.7)
    assert not torch.allclose(logits(model, expected["ids"]), want)
    hard = logits(model, expected["ids"])
    ltepass.lower(model)
    torch.testing.assert_close(logits(model, expected["ids"]), hard, rtol=1e-4, atol=1e-5)
    ltepass.unlower(model)
    assert torch.equal(logits(model, expected["ids"]), hard)
    ltepass.remove(model)
    assert not any(routers_of(model))
