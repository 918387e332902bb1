"""GGUF files hold the weights under llama.cpp's names and in its order of rows; what cannot be written is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from ltepass.errors import ConfigError
from ltepass.measure import gguf_file
from tests.measure.tiny import CONFIGS, SIZES, made


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_in_the_file_once(name: str, tmp_path: Path) -> None:
    model, path = made(name), tmp_path / "m.gguf"
    gguf_file.write(model, path, "F32")
    found = tensors(path)
    scaled = "rope_freqs.weight" in found
    assert scaled == (name == "llama 3 rope")
    assert len(found) - scaled == len(list(model.parameters()))  # a tied head is one parameter
    assert sum(values(t).double().sum().item() for n, t in found.items() if n != "rope_freqs.weight") == pytest.approx(
        sum(p.double().sum().item() for p in model.parameters()), rel=1e-9
    )
    up = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(values(found["blk.1.ffn_up.weight"]), up)
    assert all(t.tensor_type.name == "F32" for t in found.values())


@pytest.mark.parametrize(("name", "turned"), [("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", False)])
def test_rows_of_q_and_k_follow_the_familys_rope(name: str, turned: bool, tmp_path: Path) -> None:
    """llama.cpp turns neighbours in llama's graph: pair i of a head is rows i and i + half of transformers."""
    model, path = made(name), tmp_path / "m.gguf"
    gguf_file.write(model, path, "F32")
    attention, found = model.model.layers[0].self_attn, tensors(path)
    order = torch.arange(16).view(2, 8).T.flatten() if turned else torch.arange(16)
    for ours, theirs in ((attention.q_proj, "q"), (attention.k_proj, "k")):
        heads = ours.weight.unflatten(0, (-1, 16))
        assert torch.equal(values(found[f"blk.0.attn_{theirs}.weight"]), heads[:, order].flatten(0, 1))
        if ours.bias is not None:
            assert torch.equal(values(found[f"blk.0.attn_{theirs}.bias"]), ours.bias)
    assert torch.equal(values(found["blk.0.attn_v.weight"]), attention.v_proj.weight)


@pytest.mark.parametrize(
    ("format", "head", "bits", "error"),
    [
        ("BF16", "BF16", 16, 0.004),
        ("Q8_0", "Q8_0", 8.5, 0.004),
        ("Q4_0", "Q8_0", 4.5, 1 / 8),
        ("Q4_1", "Q8_0", 5, 1 / 15),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_have_the_format_and_the_head_the_one_that_is_stated(
    format: str, head: str, bits: float, error: float, tied: bool, tmp_path: Path
) -> None:
    name, path = "llama, tied, wide heads" if tied else "llama", tmp_path / "m.gguf"
    model = made(name)
    gguf_file.write(model, path, format)
    found = tensors(path)
    assert gguf_file.formats(path) == (format, head)
    assert found["token_embd.weight"].tensor_type.name == (head if tied else format)
    assert found["output_norm.weight"].tensor_type.name == "F32"
    down, written = model.model.layers[0].mlp.down_proj.weight, found["blk.0.ffn_down.weight"]
    assert (values(written) - down).abs().max() <= 1.01 * error * down.abs().max()  # scales are rounded to fp16
    assert written.n_bytes == down.numel() * bits / 8


def test_a_tokens_bytes_are_the_files_without_an_embedding_that_is_no_head(tmp_path: Path) -> None:
    for name, tied in (("llama", False), ("llama, tied, wide heads", True)):
        path, model = tmp_path / f"{tied}.gguf", made(name)
        gguf_file.write(model, path, "F32")
        every = 4 * sum(p.numel() for p in model.parameters())
        assert gguf_file.bytes_read(path) == every - (0 if tied else 4 * 60 * 64)
        width = 32 if tied else 16
        assert gguf_file.position_bytes(path) == 2 * 2 * 2 * 2 * width  # f16, layers, heads, keys and values
        assert gguf_file.vocabulary(path) == 61


def test_the_rope_of_llama3_divides_frequencies_as_transformers_does() -> None:
    model = made("llama 3 rope")
    factors = gguf_file.rope_factors(model)
    assert factors is not None
    plain = 1000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors[[0, -1]].tolist() == pytest.approx([1.0, 8.0])
    assert gguf_file.rope_factors(made("llama")) is None


def test_the_context_ends_where_a_sliding_window_does(tmp_path: Path) -> None:
    gguf_file.write(made("mistral"), tmp_path / "m.gguf", "F32")
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"]
    assert field.contents() == 128


@pytest.mark.parametrize(
    ("config", "format", "reason"),
    [
        (LlamaConfig(**SIZES), "Q3_K", "the format is 'Q3_K'; expected one of F32, BF16"),
        (GPT2Config(), "F32", "a model of type 'gpt2' cannot be written as GGUF; expected one of llama, mistral"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "F32", "the activation is 'gelu'"),
        (
            LlamaConfig(**SIZES | {"intermediate_size": 100}),
            "Q8_0",
            "a width of the model is 100; Q8_0 expects multiples of 32",
        ),
        (LlamaConfig(**SIZES), "Q4_K_M", "a width of the model is 64; Q4_K_M expects multiples of 256"),
    ],
    ids=["format", "family", "activation", "blocks of 32", "blocks of 256"],
)
def test_what_llama_cpp_cannot_run_is_refused_in_a_sentence(config: Any, format: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        gguf_file.check(config, format)


def test_ropes_without_a_place_in_the_file_are_refused_before_it_is_there(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    model = made("llama")
    yarn = type(model)(LlamaConfig(**SIZES, rope_parameters=rope))
    with pytest.raises(ConfigError, match="the rope is of type 'yarn'"):
        gguf_file.write(yarn, tmp_path / "m.gguf", "F32")
    qwen = type(made("qwen2"))(type(CONFIGS["qwen2"])(**SIZES, rope_parameters={**rope, "rope_type": "linear"}))
    with pytest.raises(ConfigError, match=r"llama\.cpp's qwen2 reads no factors"):
        gguf_file.write(qwen, tmp_path / "m.gguf", "F32")
    assert not list(tmp_path.iterdir())
