"""Small models of three kinds (aligned, inline, encoder-decoder), and sequences in padded batches or alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import ltepass
from tests.models.zoo import made_once

FAMILIES = ("llama", "opt", "t5")
PAD = 7  # a token as any other, so that padding is something to see


def dense(family: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48))
    elif family == "opt":
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=24, dropout=0.0))
    else:
        t5 = {"vocab_size": 61, "d_model": 24, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 12}
        model = T5ForConditionalGeneration(T5Config(**t5, decoder_start_token_id=0, dropout_rate=0.0))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@made_once
def transformed(family: str, **config: Any) -> Any:
    settings = ltepass.LTEConfig(group_size=4, **{"grouping": "identity", **config})
    return ltepass.transform(dense(family), config=settings)


def started(family: str, **config: Any) -> Any:
    """Calibrated, on whole sequences."""
    model = transformed(family, **config)
    ltepass.calibrate(model, [whole(family, row) for row in sequences([16] * 8, seed=9)])
    return model


def sequences(lengths: Sequence[int], seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (n,), generator=g) for n in lengths]


def whole(family: str, row: Tensor) -> dict[str, Tensor]:
    """A sequence alone. T5 learns to repeat it."""
    batch = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    return {**batch, "labels": row[None]} if family == "t5" else batch


def padded(family: str, rows: Sequence[Tensor], *, left: bool = False, extra: int = 0) -> dict[str, Tensor]:
    to = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), to), PAD), torch.zeros(len(rows), to, dtype=torch.long)
    labels = torch.full((len(rows), to + 3), -100)
    for i, row in enumerate(rows):
        where = slice(to - len(row), to) if left else slice(len(row))
        ids[i, where], mask[i, where], labels[i, : len(row)] = row, 1, row
    batch = {"input_ids": ids, "attention_mask": mask}
    if family == "t5":
        return {**batch, "labels": labels}
    return {**batch, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if family == "llama" else batch


def same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(torch.as_tensor(a[name]), torch.as_tensor(b[name]), rtol=tolerance, atol=tolerance)
