"""The tiny model of `ltepass demo`: a four-layer LLaMA on bytes, trained for seconds, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.demo.training_loop import schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TINY_STEPS = 120  # of the tiny model's own training, before the demo starts on it


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


def load_tiny(base: Path, blocks: Callable[[], Tensor], seed: int) -> PreTrainedModel:
    """Trained on these blocks [n, T] the first time; only for trying the demo itself."""
    from transformers import AutoModelForCausalLM

    if not (base / "config.json").exists():
        _train_tiny(blocks(), seed).save_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base).eval()


def untrained(d_ff: int) -> PreTrainedModel:
    """Four layers on bytes, of width 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=d_ff,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config).train()


def _train_tiny(blocks: Tensor, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = untrained(d_ff=288)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(TINY_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * schedule(step, TINY_STEPS)
        batch = blocks[torch.randint(len(blocks), (16,), generator=torch.Generator().manual_seed(seed + step))][:, :64]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
