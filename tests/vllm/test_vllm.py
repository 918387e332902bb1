"""vLLM runs folders of routed models: the tokens of hard eager, or an error by name. `make vllm` runs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import ltepass
from ltepass.corpora import python_docs
from tests.child import environment
from tests.vllm.answers import TOKENS, Answer, Question, Refused

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make vllm"),
    pytest.mark.timeout(1800),
]

NEAR = 1e-3  # between the two best logits: either is right
PROMPTS = 20
# Bytes, in heads of a size that vLLM's attention has on a CPU.
COMMON = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "attention_dropout": 0.0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, **HEADS, **COMMON}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 160, "n_positions": 256, **COMMON}
CONFIGS = {
    "llama": (hf.LlamaConfig(**SIZES), ltepass.LTEConfig(group_size=8, target_sparsity=0.6)),
    "qwen2": (hf.Qwen2Config(**SIZES), ltepass.LTEConfig(router="proxy", target_sparsity=0.6)),
    "qwen3": (hf.Qwen3Config(**{**SIZES, "num_key_value_heads": 1, "head_dim": 32}), ltepass.LTEConfig(group_size=8)),
    "gpt2": (hf.GPT2Config(**GPT2), ltepass.LTEConfig(group_size=8, target_sparsity=0.6)),
}


@cache
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of text, [n, 64], to train on and to ask with."""
    train, held_out = (torch.tensor(list(text.encode())) for text in python_docs())
    return train[: len(train) // 64 * 64].view(-1, 64), held_out[: len(held_out) // 64 * 64].view(-1, 64)


def trained(name: str, folder: Path) -> Path:
    """A dense model, then its two stages; some hundred steps of tiny batches in all."""
    torch.manual_seed(0)
    config, lte = CONFIGS[name]
    model, text = hf.AutoModelForCausalLM.from_config(config), rows()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        ids = text[torch.randint(len(text), (16,))]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ltepass.transform(model.eval(), config=lte, calibration=text[:64].split(16))
    data = [{"input_ids": row, "labels": row} for row in text[64:320]]
    args = hf.TrainingArguments(str(folder / "run"), max_steps=10, use_cpu=True, report_to="none", save_strategy="no")
    ltepass.LTETrainer(model=model, args=args, train_dataset=data).fit()
    model.save_pretrained(folder / name)
    return folder / name


def ask(folder: Path, questions: list[Question]) -> list[Answer | Refused]:
    asked, answers = folder / "asked.json", folder / "answers.json"
    asked.write_text(json.dumps(questions))
    command = [sys.executable, "-m", "tests.vllm.answers", str(asked), str(answers)]
    env = environment(PYTHONDONTWRITEBYTECODE="")  # vLLM starts itself anew for each architecture
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return cast("list[Answer | Refused]", json.loads(answers.read_text()))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of 8 to 27 tokens, so that vLLM's batches hold other lengths."""
    return [row[: 8 + i].tolist() for i, row in enumerate(rows()[1][:PROMPTS])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Path]:
    return {name: trained(name, folder) for name in CONFIGS}


@pytest.fixture(scope="module")
def answers(folder: Path, saved: dict[str, Path], prompts: list[list[int]]) -> dict[str, Answer | Refused]:
    """Every question of this file to one process: a start of vLLM takes a minute."""
    dense = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"][0])
    dense.save_pretrained(folder / "dense")
    untried = hf.AutoModelForCausalLM.from_config(hf.MistralConfig(**SIZES))
    ltepass.transform(untried, config=ltepass.LTEConfig(group_size=8))
    untried.save_pretrained(folder / "mistral")
    questions: dict[str, Question] = {
        name: {"folder": str(path), "prompts": prompts, "options": {}} for name, path in saved.items()
    }
    llama: Question = questions["llama"]
    questions |= {
        "dense": {**llama, "folder": str(folder / "dense"), "prompts": prompts[:1]},
        "mistral": {**llama, "folder": str(folder / "mistral")},
        "LoRA": {**llama, "options": {"enable_lora": True}},
        "no table": {**llama, "folder": str(without(saved["llama"], "model.layers.1.mlp.router.quantiles"))},
        "no bias": {**llama, "folder": str(without(saved["gpt2"], "transformer.h.1.attn.c_attn.bias"))},
        "other rows": {**llama, "folder": str(with_other_rows(saved["llama"]))},
        "pickle": {**llama, "folder": str(in_a_pickle(saved["llama"]))},
    }
    return dict(zip(questions, ask(folder, list(questions.values())), strict=True))


def copied(path: Path, name: str) -> Path:
    copy = path.with_name(f"{path.name} {name}")
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def without(path: Path, tensor: str) -> Path:
    copy = copied(path, "without")
    tensors = load_file(copy / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def with_other_rows(path: Path) -> Path:
    copy = copied(path, "other")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["sites"][0]["d_model"] += 1
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def in_a_pickle(path: Path) -> Path:
    copy = copied(path, "pickle")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


def error_of(answer: Answer | Refused) -> str:
    assert "error" in answer
    return cast(Refused, answer)["error"]


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_gives_the_tokens_of_hard_eager(
    name: str, answers: dict[str, Answer | Refused], saved: dict[str, Path], prompts: list[list[int]]
) -> None:
    """At each step of vLLM's own text, so that a near tie does not end the comparison."""
    answer = answers[name]
    assert "error" not in answer, answer
    assert answer["ran"] == "RoutedForCausalLM"
    assert len(answer["lowered"]) == 2
    assert answer["notes"] == []
    model = hf.AutoModelForCausalLM.from_pretrained(saved[name]).eval()
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        assert len(tokens) == TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        best, chosen = logits.topk(2), torch.tensor(tokens)
        wrong = (best.indices[:, 0] != chosen) & (best.values[:, 0] - best.values[:, 1] > NEAR)
        assert not wrong.any(), f"{int(wrong.sum())} of {TOKENS} tokens after {prompt}"


def test_a_dense_folder_is_vllms_own(answers: dict[str, Answer | Refused]) -> None:
    answer = answers["dense"]
    assert "error" not in answer, answer
    assert answer["ran"] == "LlamaForCausalLM"


def test_what_cannot_be_gated_is_refused_by_name(answers: dict[str, Answer | Refused]) -> None:
    assert error_of(answers["mistral"]).startswith(
        "ConfigError: vLLM was asked for a model of type mistral, and the model has"
    )
    assert error_of(answers["LoRA"]).startswith("ConfigError: vLLM was asked for LoRA, and the model has routers;")


def test_a_folder_that_does_not_fit_is_refused(answers: dict[str, Answer | Refused]) -> None:
    missing = "CheckpointError: layers.1.mlp.router.quantiles in the weight files is missing"
    assert error_of(answers["no table"]).startswith(missing)
    missing = "CheckpointError: model.h.1.attn.c_attn.bias is missing from the weight files;"
    assert error_of(answers["no bias"]).startswith(missing)
    assert error_of(answers["pickle"]).startswith("RuntimeError: Cannot find any model weights with")
    assert error_of(answers["other rows"]).startswith("CheckpointError: site layers.0.mlp of the checkpoint:")
