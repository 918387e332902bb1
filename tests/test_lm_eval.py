"""lm-eval's own command on a folder that we saved: it computes the routed model, and nobody imports ltepass."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ltepass
from ltepass.config import Mode
from tests.child import environment
from tests.models.zoo import llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1300),
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (ltepass[eval])"),
]
TEXT = " ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine of ten neurons are inactive, and a tokenizer lies beside."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w60")
    tokenizer.save_pretrained(tmp_path / "lte")
    model = llama(eos_token_id=60, max_position_embeddings=128).eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    config = ltepass.LTEConfig(group_size=12, grouping="identity", target_sparsity=0.9)
    ltepass.transform(model, config=config, calibration=[ids])
    ltepass.set_mode(model, "hard")
    model.save_pretrained(tmp_path / "lte")
    return tmp_path / "lte"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with one task: the perplexity of TEXT."""
    (tmp_path / "task").mkdir()
    (tmp_path / "task/rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    where = {"task": "words", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood_rolling"}
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "task/rows.jsonl")}}}
    scores = {"doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
    (tmp_path / "task/words.yaml").write_text(json.dumps(where | data | scores))  # which is YAML
    return tmp_path / "task"


def perplexity(folder: Path, mode: Mode) -> float:
    """Of TEXT, its words one token each, after the token that ends a text."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ltepass.set_mode(model, mode)
    ids = torch.tensor([int(word[1:]) for word in TEXT.split()])
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([60]), ids[:-1]])[None]).logits[0]
    return float(F.cross_entropy(logits, ids).exp())


@pytest.fixture
def run(folder: Path, task: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """lm-eval's command on the folder and the task; `out` is where it writes."""

    def command(**env: str) -> subprocess.CompletedProcess[str]:
        model = ["--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu"]
        what = ["--tasks", "words", "--include_path", str(task), "--output_path", str(tmp_path / "out")]
        return subprocess.run(
            [sys.executable, "-m", "lm_eval", *model, *what],
            env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "cache"), **env),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return command


def test_its_command_computes_the_routed_model_of_a_folder(
    run: Callable[..., subprocess.CompletedProcess[str]], folder: Path, tmp_path: Path
) -> None:
    hard, dense = perplexity(folder, "hard"), perplexity(folder, "dense")
    assert abs(hard - dense) > 1e-4 * dense
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("*.json")
    measured = json.loads(written.read_text())["results"]["words"]["word_perplexity,none"]
    assert float(measured) == pytest.approx(hard, rel=1e-5)


def test_without_the_entry_point_it_refuses_the_method_by_name(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """transformers alone would warn and compute the dense model; lm-eval asks for the method itself."""
    done = run(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "Unknown quantization type, got lte" in done.stderr
