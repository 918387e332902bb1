"""Lowering: each FFN becomes one sparse op. The result is that of hard mode in eager, and generate() works."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import ltepass


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=211, bos_token_id=0, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 211, (1, 9))
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=16, grouping="identity"))
    ltepass.set_mode(model, "hard")
    eager = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    ltepass.lower(model, scope="ffn")
    lowered = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(eager, lowered), "token for token"
    ltepass.unlower(model)
    print(lowered[0].tolist())


if __name__ == "__main__":
    main()
