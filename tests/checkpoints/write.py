"""Writes small checkpoints with the code of the day: `python -m tests.checkpoints.write FOLDER`.

A folder here is written once, by the format version it is named after, and never again: later code must load it. Beside
the model lies `expected.safetensors`: token ids, and the logits that the code which wrote it gave for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file

import ltepass
from ltepass.routed.sites import routers_of

SIZES: dict[str, Any] = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(3, 35).reshape(2, 16)


def llama(layers: int = 2) -> Any:
    config = hf.LlamaConfig(hidden_size=24, intermediate_size=60, **{**SIZES, "num_hidden_layers": layers})
    return hf.LlamaForCausalLM(config)


def opt() -> Any:
    config = hf.OPTConfig(hidden_size=24, ffn_dim=60, word_embed_proj_dim=24, max_position_embeddings=64, **SIZES)
    return hf.OPTForCausalLM(config)


def phi3() -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**sizes, **SIZES))


def t5() -> Any:
    sizes = {"d_model": 24, "d_ff": 60, "d_kv": 6, "num_layers": 1, "num_heads": 4, "vocab_size": 61}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


# name -> (model, settings of the transform, arguments of save_pretrained)
CHECKPOINTS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "aligned": (llama, {}, {}),
    "inline": (opt, {}, {}),
    "fused": (phi3, {}, {}),
    "encoder_decoder": (t5, {}, {}),
    "sharded": (lambda: llama(3), {}, {"max_shard_size": "20KB"}),
    "cuts": (llama, {"hidden_sparsity": 0.3, "input_sparsity": 0.2}, {}),
    "no_bias": (llama, {"router_bias": False, "tau": 0.4, "grouping": "random"}, {}),
    "shared_budget": (llama, {"budget": "model"}, {}),
}


def inputs_of(model: Any) -> dict[str, Any]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def write(name: str, folder: Path) -> None:
    make, settings, saving = CHECKPOINTS[name]
    torch.manual_seed(0)
    model = make().eval()
    batch = inputs_of(model)
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=5, **settings), calibration=[batch])
    ltepass.set_mode(model, "hard")
    model.save_pretrained(folder, **saving)
    with torch.no_grad():
        logits = model(**batch).logits
    dense = {f"permutation.{i}": r.permutation for i, r in enumerate(routers_of(model))}
    save_file({"ids": IDS, "logits": logits, **dense}, folder / "expected.safetensors")


if __name__ == "__main__":
    for checkpoint in CHECKPOINTS:
        write(checkpoint, Path(sys.argv[1]) / checkpoint)
