"""The two models of the comparisons: SmolLM2-135M, and a small one that is trained here in half a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltepass.demo.tiny import Bytes, untrained

TINY_STEPS, TINY_BATCH, TINY_LENGTH = 200, 16, 64


def load(name: str, folder: Path, train: Tensor | None = None) -> Any:
    """name: smollm2; tiny (trained on `train` [n, T] once, then read from the folder); a model's directory."""
    from transformers import AutoModelForCausalLM

    if name == "smollm2":
        from ltepass.demo.smollm import load_smollm2

        return load_smollm2()[0]
    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    base = folder / "tiny"
    if not (base / "config.json").exists():
        assert train is not None, "the tiny model is trained on first use"
        _train_tiny(train).save_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base).eval()


def tokenizer(name: str) -> Any:
    if name == "tiny":
        return Bytes()
    if name == "smollm2":
        from ltepass.demo.smollm import load_smollm2

        return load_smollm2()[1]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _train_tiny(blocks: Tensor) -> Any:
    """FFN 96 -> 384, so that groups of 8, 16, 32 and 64 all fit."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = untrained(d_ff=384)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, TINY_STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(TINY_STEPS):
        rows = blocks[torch.randint(len(blocks), (TINY_BATCH,), generator=generator)][:, :TINY_LENGTH]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.random.set_rng_state(state)
    return model.eval()
