"""`ltepass generate`: a saved model, lowered, continues a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ltepass
from ltepass.commands.load import load
from ltepass.errors import ConfigError
from ltepass.exporting.package import ABOUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    folder: str, prompt: str, *, new_tokens: int = 64, sparsity: float | None = None, device: str = "cpu"
) -> str:
    """The prompt and its greedy continuation by a saved model, lowered. Raises LTEError where it holds no routers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (Path(folder) / ABOUT).exists():
        if sparsity is not None:
            raise ConfigError("--sparsity was given, and an exported folder has the one it was exported with")
        return _exported(Path(folder), tokenizer, prompt, new_tokens)
    model = load(folder, device)
    if sparsity is not None:
        ltepass.set_sparsity(model, sparsity)
    ltepass.lower(model, scope="ffn")
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


def _exported(folder: Path, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    from ltepass.exporting.decoder import ExportedDecoder

    ids = tokenizer(prompt)["input_ids"]
    new = list(ExportedDecoder(folder).generate(ids, new_tokens))
    text: str = tokenizer.decode(ids + new, skip_special_tokens=True)
    return text
