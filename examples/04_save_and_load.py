"""Saving and loading are transformers' own calls; without ltepass the same folder loads as the dense model."""

from __future__ import annotations

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ltepass


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=211
    )
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(12)[None]
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=16, grouping="random"))
    ltepass.set_mode(model, "hard")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model(ids).logits, again(ids).logits)
    ltepass.remove(again)
    print(f"{type(again).__name__} is dense again: {sum(p.numel() for p in again.parameters()):,} parameters")


if __name__ == "__main__":
    main()
