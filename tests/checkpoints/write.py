"""Writes small checkpoints with the code of the day: `python -m tests.checkpoints.write FOLDER`.

A folder here is written once, by the format version it is named after, and never again: later code must load it. Beside
the model lies `expected.safetensors`: token ids, and the logits that the code which wrote it gave for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import ltepass
from ltepass.routed.routed import routers_of
from tests.models import zoo

IDS = torch.arange(3, 35).reshape(2, 16)

llama = partial(zoo.llama, num_attention_heads=4)
# name -> (model, settings of the transform, arguments of save_pretrained)
CHECKPOINTS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "aligned": (llama, {}, {}),
    "inline": (partial(zoo.opt, num_attention_heads=4), {}, {}),
    "fused": (partial(zoo.phi3, num_attention_heads=4), {}, {}),
    "encoder_decoder": (zoo.t5, {}, {}),
    "sharded": (lambda: llama(3), {}, {"max_shard_size": "20KB"}),
    "cuts": (llama, {"hidden_sparsity": 0.3, "input_sparsity": 0.2}, {}),
    "no_bias": (llama, {"router_bias": False, "tau": 0.4, "grouping": "random"}, {}),
    "shared_budget": (llama, {"budget": "model"}, {}),
    "proxy": (llama, {"router": "proxy", "group_size": 1}, {}),
    "proxy_plain": (
        partial(zoo.opt, num_attention_heads=4),
        {"router": "proxy", "proxy_scales": "rows"},
        {},
    ),
    "tiers": (llama, {"router": "proxy", "group_size": 1, "inactive": "low_bit", "low_bit_sparsity": 0.3}, {}),
}


def inputs_of(model: Any) -> dict[str, Any]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def write(name: str, folder: Path) -> None:
    make, settings, saving = CHECKPOINTS[name]
    torch.manual_seed(0)
    model = make().eval()
    batch = inputs_of(model)
    ltepass.transform(model, config=ltepass.LTEConfig(**{"group_size": 5, **settings}), calibration=[batch])
    ltepass.set_mode(model, "hard")
    model.save_pretrained(folder, **saving)
    with torch.no_grad():
        logits = model(**batch).logits
    dense = {f"permutation.{i}": r.permutation for i, r in enumerate(routers_of(model))}
    save_file({"ids": IDS, "logits": logits, **dense}, folder / "expected.safetensors")


if __name__ == "__main__":
    for checkpoint in CHECKPOINTS:
        write(checkpoint, Path(sys.argv[1]) / checkpoint)
