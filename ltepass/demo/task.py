"""What the demo works on: a model, its tokenizer, and train and held-out token blocks that share no paragraph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ltepass.demo.learning import schedule
from ltepass.measure.text_blocks import Tokenizer, python_docs, token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAIN_LENGTH = 256  # tokens of one training block
TINY_STEPS = 120  # of the tiny model's own training, before the demo starts on it


@dataclass(frozen=True, kw_only=True)
class Task:
    """train: [n, T] int64; test: [m, T'] int64; prompt: text to continue; steps: default number of optimizer steps."""

    name: str
    tokenizer: SavedTokenizer
    train: Tensor
    test: Tensor
    prompt: str
    steps: int
    batch: int  # blocks of one optimizer step
    calibration_blocks: int
    group_size: int
    new_tokens: int  # timed and generated

    @property
    def test_text(self) -> str:
        return f"{self.test.shape[0]} x {self.test.shape[1]} tokens"


PROMPT = "The with statement is used to wrap the execution of a block with methods defined by a context manager."


def load_task(model: str) -> Task:
    """Tokenizer and texts of "smollm2" or "tiny"."""
    tokenizer = Bytes() if model == "tiny" else _smollm2()[1]
    train, held_out = python_docs()
    name, length, rest = _SIZES[model]
    return Task(
        name=name,
        tokenizer=tokenizer,
        train=token_blocks(tokenizer, train, TRAIN_LENGTH),
        test=token_blocks(tokenizer, held_out, length, limit=8),
        prompt=PROMPT,
        **rest,
    )


_SIZES: dict[str, tuple[str, int, dict[str, int]]] = {
    "smollm2": (
        "SmolLM2-135M-Instruct (from its 4-bit GGUF)",
        512,
        {"steps": 60, "batch": 4, "calibration_blocks": 32, "group_size": 8, "new_tokens": 96},
    ),
    "tiny": (
        "tiny byte-level LLaMA, trained for seconds",
        256,
        {"steps": 30, "batch": 8, "calibration_blocks": 16, "group_size": 8, "new_tokens": 48},
    ),
}


def load_dense(model: str, out: Path, seed: int) -> PreTrainedModel:
    """The dense model of "smollm2" or "tiny" as it came: eval mode, fp32, on the CPU."""
    return _tiny(out / "base", seed) if model == "tiny" else _smollm2()[0]


def _smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from ltepass.demo.smollm import load_smollm2

    return load_smollm2()


class SavedTokenizer(Tokenizer, Protocol):
    """A tokenizer that a model's folder can hold."""

    def save_pretrained(self, save_directory: Path, /) -> object: ...


class Bytes:
    """A tokenizer of 256 tokens for the tiny model: UTF-8 bytes."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: Sequence[int] | Tensor, **_: object) -> str:
        return bytes(int(i) for i in ids).decode(errors="replace")

    def save_pretrained(self, folder: Path, /) -> None:
        """As transformers' AutoTokenizer loads it: every byte a token, and no merges."""
        from tokenizers import Tokenizer as Built
        from tokenizers import decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        built = Built(models.BPE({character: byte for byte, character in _characters().items()}, []))
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        built.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=built).save_pretrained(folder)


def _characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level tokenizers since GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _tiny(base: Path, seed: int) -> PreTrainedModel:
    """A four-layer LLaMA on bytes, trained for seconds the first time; only for trying the demo itself."""
    from transformers import AutoModelForCausalLM

    if not (base / "config.json").exists():
        _train_tiny(load_task("tiny").train, seed).save_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base).eval()


def _train_tiny(blocks: Tensor, seed: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.06,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(TINY_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * schedule(step, TINY_STEPS)
        batch = blocks[torch.randint(len(blocks), (16,), generator=torch.Generator().manual_seed(seed + step))][:, :64]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
