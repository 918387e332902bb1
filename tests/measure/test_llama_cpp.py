"""llama.cpp itself computes what transformers does from the files that we write. Skipped where it is not installed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ltepass.commands.bench import BenchOptions, _sides
from ltepass.errors import ConfigError
from ltepass.measure import gguf_file, llama_cpp
from ltepass.measure.bench_tokens import Text
from ltepass.measure.processes import Seat, workers
from ltepass.measure.quality import perplexity
from ltepass.measure.sides.llama_cpp_side import LlamaCpp
from tests.measure.tiny import CONFIGS, SIZES, made

pytest.importorskip("llama_cpp")
IDS = torch.arange(100) * 7 % 61


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model, path = made(name), tmp_path / "m.gguf"
    gguf_file.write(model, path, "F32")
    theirs = llama_cpp.LlamaCpp(path, threads=1, length=128, cache="f32")
    expected = model(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(theirs.logits(IDS), expected, rtol=0, atol=1e-4)
    theirs.forget()
    theirs.read(IDS[:60].tolist())
    for i in range(60, 64):
        theirs.read([int(IDS[i])])
        assert theirs.next_token() == expected[i].argmax()
    theirs.close()


@pytest.mark.parametrize("format", ["BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_format_runs_and_its_facts_are_the_files(format: str, tmp_path: Path) -> None:
    model, path = made("qwen2"), tmp_path / "m.gguf"
    gguf_file.write(model, path, format)
    engine: Any = LlamaCpp(path=path).open(128)
    assert len(engine.times(IDS[:64], IDS[64:80])) == 16
    facts = engine.facts(IDS, 64, IDS.view(2, 50))
    assert (facts.format, facts.head) == gguf_file.formats(path)
    assert facts.weight_bytes < 0.6 * 4 * sum(p.numel() for p in model.parameters())
    assert facts.perplexity == pytest.approx(perplexity(model, IDS.view(2, 50)), rel=0.2)
    assert "CPU" in facts.how


def test_q4_k_m_is_made_by_llama_cpp_where_widths_allow(tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    gguf_file.check(model.config, "Q4_K_M")
    gguf_file.write(model, tmp_path / "source.gguf", "F32")
    llama_cpp.requantise(tmp_path / "source.gguf", tmp_path / "m.gguf")
    assert gguf_file.formats(tmp_path / "m.gguf") == ("Q4_K", "Q6_K")
    llama_cpp.LlamaCpp(tmp_path / "m.gguf", threads=1, length=64).read([1, 2, 3])


def test_a_prompt_longer_than_a_batch_is_read_in_pieces(tmp_path: Path) -> None:
    gguf_file.write(made("llama"), tmp_path / "m.gguf", "F32")
    ids = torch.randint(0, 60, (llama_cpp.BATCH + 90,), generator=torch.Generator().manual_seed(2)).tolist()
    whole, one_by_one = (llama_cpp.LlamaCpp(tmp_path / "m.gguf", threads=1, length=700, cache="f32") for _ in range(2))
    whole.read(ids)
    for token in ids:
        one_by_one.read([token])
    assert whole.next_token() == one_by_one.next_token()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF, not")
    with pytest.raises(ConfigError, match=r"llama\.cpp cannot load"):
        llama_cpp.LlamaCpp(tmp_path / "m.gguf", threads=1, length=64)


def test_the_command_lists_each_format_there_and_floats_here(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path / "model")
    gguf_file.write(made("qwen2"), tmp_path / "extra.gguf", "Q8_0")
    options = BenchOptions(against=("llama.cpp",), formats=("F32", "Q8_0"), gguf=tmp_path / "extra.gguf")
    with _sides(str(tmp_path / "model"), options) as sides, workers(sides, threads=1, length=128) as opened:
        names = ["transformers", "llama.cpp", "llama.cpp", "llama.cpp, extra.gguf"]
        assert [worker.side.name for worker in opened] == names
        text = Text(ids=IDS, tokens=16, blocks=IDS.view(2, 50))
        found = [
            worker.ask(partial(Seat.facts, ids=text.ids, prompt_tokens=64, blocks=text.blocks)) for worker in opened
        ]
        assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-3)
        assert [facts.format for facts in found] == ["F32", "F32", "Q8_0", "Q8_0"]
    gguf_file.write(type(made("qwen2"))(type(CONFIGS["qwen2"])(**SIZES | {"vocab_size": 64})), options.gguf, "F32")  # type: ignore[arg-type]
    with (
        pytest.raises(ConfigError, match="knows 64 tokens; expected the model's 61"),
        _sides(str(tmp_path / "model"), options),
    ):
        pass
