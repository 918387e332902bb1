"""onnxruntime-genai computes what transformers does from the same weights. What needs it is skipped where it is not."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ltepass.commands.bench import BenchOptions, _sides
from ltepass.errors import ConfigError
from ltepass.measure.processes import Seat, workers
from ltepass.measure.sides import onnxruntime_side
from ltepass.measure.sides.onnxruntime_side import under_onnxruntime
from tests.measure.tiny import made

IDS = torch.randint(0, 60, (100,), generator=torch.Generator().manual_seed(0))


def saved(folder: Path) -> str:
    """A model with a tokenizer beside it, which the builder of onnxruntime-genai wants."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made("llama").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    return str(folder)


def test_it_computes_what_transformers_does_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = saved(tmp_path / "model")
    options = BenchOptions(against=("onnxruntime",), formats=("F32", "BF16", "Q8_0"))
    with _sides(folder, options) as sides, workers(sides, threads=1, length=128) as opened:
        found = {
            (worker.side.name, facts.format): facts
            for worker in opened
            for facts in [worker.ask(partial(Seat.facts, ids=IDS, prompt_tokens=64, blocks=IDS.view(2, 50)))]
        }
    ours, theirs = found["transformers", "F32"], found["onnxruntime", "F32"]
    assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-3)
    assert theirs.weight_bytes == pytest.approx(ours.weight_bytes, rel=0.02)
    assert found["onnxruntime", "Q8_0"].held_bytes < 0.4 * theirs.held_bytes
    assert ("onnxruntime", "BF16") not in found


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(ConfigError, match=r"onnxruntime-genai cannot be loaded .*; pip install 'ltepass\[compare\]'"):
        onnxruntime_side.library()


def test_formats_that_its_builder_does_not_make_are_refused_when_there_is_no_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="onnxruntime is measured in F32, Q8_0, Q4_0; --formats has none of them"):
        under_onnxruntime(made("llama"), ("BF16", "Q4_1"), "nowhere", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_program_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--against has 'vllm'; expected some of llama\.cpp, onnxruntime"):
        BenchOptions(against=("vllm",))
