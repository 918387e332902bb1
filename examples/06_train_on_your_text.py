"""Train on your own text, by the command line: a dense model and a text become a sparse model that was measured.

Each command is called here as a shell would call it: `ltepass train dense text.txt --out lte-model ...`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ltepass.cli import app
from ltepass.corpora import python_docs


def ltepass(*arguments: object) -> None:
    print("$ ltepass", *arguments)
    app([str(argument) for argument in arguments], standalone_mode=False)


def save_dense(folder: Path, text: str) -> None:
    """In the place of a model of yours: a small LLaMA that has seen the text for some seconds, and its tokenizer."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    built.train_from_iterator([text], trainers.BpeTrainer(vocab_size=512, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, bos_token_id=None, eos_token_id=None, **sizes))
    blocks = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 64 * 128]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(60):
        ids = blocks[step % 16 :: 16]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        dense, text, out = (Path(scratch) / name for name in ("dense", "text.txt", "lte-model"))
        text.write_text(python_docs()[0][:40_000])
        save_dense(dense, text.read_text())
        ltepass("train", dense, text, "--out", out, "--group-size", 8, "--steps", 20, "--length", 64)
        ltepass("generate", out, "The statement", "--new-tokens", 24)
        ltepass("report", out, "--html", "report.html", "--text", text, "--length", 64, "--sparsities", "0.3,0.5,0.7")


if __name__ == "__main__":
    main()
