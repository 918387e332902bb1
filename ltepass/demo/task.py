"""What the demo works on: a model, its tokenizer, and train and held-out token blocks that share no paragraph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ltepass.corpora import Tokenizer, other_texts, python_docs, token_blocks
from ltepass.demo.tiny import Bytes, load_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAIN_LENGTH = 256  # tokens of one training block
TEST_BLOCKS = 8  # of each kind of text: what an interval needs; `ltepass eval --limit 64` narrows it
MOST_CHARACTERS = 12  # of a token, on average


@dataclass(frozen=True, kw_only=True)
class Task:
    """train: [n, T] int64; test: [m, T'] int64; others: the same of other kinds of text; prompt: text to continue;
    steps: default number of optimizer steps."""

    name: str
    tokenizer: SavedTokenizer
    train: Tensor
    test: Tensor
    others: dict[str, Tensor]
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
    others = {kind: text[: TEST_BLOCKS * length * MOST_CHARACTERS] for kind, text in other_texts().items()}
    return Task(
        name=name,
        tokenizer=tokenizer,
        train=token_blocks(tokenizer, train, TRAIN_LENGTH),
        test=token_blocks(tokenizer, held_out, length, limit=TEST_BLOCKS),
        others={kind: token_blocks(tokenizer, text, length, TEST_BLOCKS) for kind, text in others.items()},
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
    return load_tiny(out / "base", lambda: load_task("tiny").train, seed) if model == "tiny" else _smollm2()[0]


def _smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from ltepass.demo.smollm import load_smollm2

    return load_smollm2()


class SavedTokenizer(Tokenizer, Protocol):
    """A tokenizer that a model's folder can hold."""

    def save_pretrained(self, save_directory: Path, /) -> object: ...
