"""`ltepass generate`: a saved model, lowered, continues a text."""

from __future__ import annotations

import ltepass
from ltepass.commands.load import load


def generate(
    folder: str, prompt: str, *, new_tokens: int = 64, sparsity: float | None = None, device: str = "cpu"
) -> str:
    """The prompt and its greedy continuation by a saved model, lowered. Raises LTEError where it holds no routers."""
    from transformers import AutoTokenizer

    model = load(folder, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if sparsity is not None:
        ltepass.set_sparsity(model, sparsity)
    ltepass.lower(model, scope="ffn")
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
