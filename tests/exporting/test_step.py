"""The captured step computes what the model computes, token after token; what has no such step is refused by name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import ltepass
from ltepass.errors import ConfigError, ExportError, LoweredError, LoweringError, LTEError
from ltepass.exporting.export_model import passes
from ltepass.exporting.folder import bytes_read
from ltepass.measure import token_bytes
from ltepass.passes.capture.decoder_step import capture_step
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from tests.models.zoo import VOCAB, build, llama, logits, transformed

SMALL = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 60}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64}


def qwen3(**more: Any) -> hf.PreTrainedModel:
    config = hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, **more)
    return hf.Qwen3ForCausalLM(config).eval()


def windowed() -> hf.PreTrainedModel:
    """Each token sees three."""
    return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=3, head_dim=6)).eval()


def mixed() -> hf.PreTrainedModel:
    """A window in one layer, none in the other."""
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=kinds)
    return hf.Gemma3ForCausalLM(config).eval()


MODELS = {
    "llama": lambda: build("llama"),
    "grouped": lambda: llama(num_key_value_heads=1).eval(),
    "gpt2": lambda: build("gpt2"),
    "phi3": lambda: build("phi3"),
    "gpt_neox": lambda: build("gpt_neox"),
    "opt": lambda: build("opt"),
    "qwen3": qwen3,
    "windowed": windowed,
    "mixed": mixed,
    "gated": lambda: transformed("llama"),
    "bf16": lambda: build("llama").to(torch.bfloat16),
}


def tokens(n: int) -> Tensor:
    return torch.randint(3, VOCAB, (1, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("name", MODELS)
def test_the_step_computes_the_models_logits(name: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    step = capture_step(model, length=24)
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    ids, cache = tokens(16), torch.full_like(step.cache, float("nan"))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
        position, got = 0, []
        for size in (7, 1, 1, 4, 1, 1, 1):
            part = ids[:, position : position + size]
            got.append(step.graph(part, torch.tensor(position), cache)[0, -1])
            position += size
    ends = torch.tensor([6, 7, 8, 12, 13, 14, 15])
    tolerance = 3e-2 if model.dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(torch.stack(got), expected[ends], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_bytes_counted_in_the_graph_are_those_counted_in_the_modules(tied: bool, gated: bool) -> None:
    model: Any = transformed("llama", tie_word_embeddings=tied) if gated else llama(tie_word_embeddings=tied).eval()
    step = capture_step(model, length=16)
    run_passes(passes(None), GraphJob(step.graph))
    whole, by_neuron = bytes_read(step.graph)
    rotary = model.get_submodule("model.rotary_emb").get_buffer("inv_freq").nbytes
    thresholds = 2 * 4 if gated else 0  # no parameters either
    assert whole + by_neuron - rotary - thresholds == token_bytes.weights_read(model)
    assert by_neuron == (2 * 3 * 60 * 24 * 4 if gated else 0)


def test_bytes_of_int8_ffns_are_codes_and_the_scales_of_their_neurons() -> None:
    step = capture_step(transformed("llama"), length=16)
    run_passes(passes("int8"), GraphJob(step.graph))
    assert bytes_read(step.graph)[1] == 2 * (3 * 60 * 24 + 2 * 60 * 4)


def test_a_cache_of_fewer_bits_is_near() -> None:
    model = build("llama")
    step = capture_step(model, length=16, cache_dtype=torch.bfloat16)
    assert step.cache.dtype == torch.bfloat16
    with torch.no_grad():
        got = step.graph(tokens(9), torch.tensor(0), step.cache)[0, -1]
        expected = model(tokens(9)).logits[0, -1]
    assert torch.allclose(got, expected, atol=3e-2)
    assert not torch.equal(got, expected)


def test_dropout_of_a_model_in_training_mode_is_left_out_and_the_mode_stays() -> None:
    model = llama(attention_dropout=0.5)
    model.train()
    model.get_submodule("lm_head").eval()
    step = capture_step(model, length=16)
    assert model.training
    assert not model.get_submodule("lm_head").training
    with torch.no_grad():
        got = step.graph(tokens(5), torch.tensor(0), step.cache)
        assert torch.allclose(got[0, -1], model.eval()(tokens(5)).logits[0, -1], atol=1e-4)


def gemma2() -> Any:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)).eval()


def mamba() -> Any:
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 1, "state_size": 4}
    return hf.MambaForCausalLM(hf.MambaConfig(**sizes)).eval()


def bloom() -> Any:
    """A bias by distance, and attention of its own."""
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=1, n_head=4)).eval()


def on_meta() -> Any:
    with torch.device("meta"):
        return llama()


def soft() -> Any:
    return transformed("llama", mode="soft")


REFUSED: dict[str, tuple[Any, type[LTEError], str]] = {
    "a soft cap": (gemma2, ExportError, "softcap"),
    "no attention": (mamba, ExportError, "Mamba"),
    "its own attention": (bloom, ExportError, "Bloom"),
    "an own module": (lambda: build("own"), ExportError, "no model of transformers"),
    "no weights": (on_meta, ExportError, "on meta"),
    "soft gates": (soft, LoweringError, "hard"),
    "lowered": (lambda: ltepass.lower(build("llama"), ffn=False), LoweredError, "unlower"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name_and_writes_nothing(case: str, tmp_path: Any) -> None:
    make, error, words = REFUSED[case]
    model = make()
    with pytest.raises(error, match=words):
        ltepass.export(model, tmp_path / "out", length=16)
    assert not (tmp_path / "out").exists()
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    assert not str(attention).startswith("ltepass"), "as it was"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"linears": "int3"}, "linears is 'int3'"),
        ({"cache_dtype": torch.float64}, "cache_dtype is torch.float64"),
        ({"length": 1}, "length is 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        ltepass.export(build("llama"), tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["gated", "llama"])
def test_a_model_that_is_captured_computes_meanwhile_and_after_an_interruption(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    expected, seen, attention = logits(model), [], model.config._attn_implementation

    def interrupted(*_: Any, **__: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(logits, model).result(60))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture_step(model, 16)
    assert torch.equal(seen[0], expected)
    assert torch.equal(logits(model), expected)
    assert model.config._attn_implementation == attention
