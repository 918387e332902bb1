"""Tiny random models of transformers' architectures: a model type's default config, shrunk by the names of its fields.

One table of field names serves every architecture; what it cannot know stands in `FIXES`, a line a model type. Layers
are picked so that every kind of layer that the default config has (dense and sparse, full and linear attention) is
still there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from examples.coverage.examine import Example

D_MODEL, D_FF, HEADS, HEAD_DIM, VOCAB = 64, 96, 4, 16, 120
MAX_PARAMETERS = 30_000_000

# (pattern of the whole field name, value), first hit counts; only integer fields above the value are changed.
SIZES: tuple[tuple[str, int], ...] = (
    (
        r"(max_)?(n_positions|position_embeddings|max_position_embeddings|n_ctx|seq_len|max_seq_len|max_source_positions)",
        64,
    ),
    (r".*vocab(_size)?(_per_layer_input)?", VOCAB),
    (r"num_attention_heads|.*attention_heads|n_heads?|num_heads", HEADS),
    (r".*(num_key_value_heads|kv_n_heads|num_kv_heads)", 2),
    (r"(num_hidden|n|num|encoder|decoder|conf_num_hidden)_?layers?|depth|num_blocks|num_layers_per_stack", 2),
    (
        r"head_dim|.*attention_head_dim|dim_head|kv_channels|v_head_dim|global_head_dim|swa_head_dim|index_head_dim",
        HEAD_DIM,
    ),
    (r"(qk_rope|qk_nope)_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 16),
    (r"(q|kv|o)_lora_rank", 24),
    (r"hidden_size|n_embd|d_model|embedding_size|word_embed_proj_dim|out_hidden_size|backbone_hidden_size", D_MODEL),
    (r"attention_hidden_size|hidden_size_global|proj_dim|input_size|adapter_((in|out)_dim|input_size)", D_MODEL),
    (r"(moe|shared|expert|shared_experts?|moe_shared_expert|dense)_?intermediate_size", 32),
    (r".*intermediate_size.*|.*ffn_dim|n_inner|d_ff|dff|dim_ff|ffn_hidden_size|mlp_dim", D_FF),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k|experts_top_k|topk", 2),
    (r"first_k_dense_replace|(num|n)_dense_layers", 1),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups", 1),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim|linear_head_dim|linear_(key|value)_head_dim", 16),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads", 4),
    (r"state_size|ssm_state_size|mamba_d_state", 8),
    (r".*chunk_size|.*block_size|sliding_window.*|.*window_size|window", 8),
    (r"time_step_rank|mamba_dt_rank|laurel_rank|gated_norm_rank|hc_lowrank|prompt_length", 8),
    (r"hidden_size_per_layer_input|ple_embed_dim", 16),
)
_TOKEN = re.compile(r".*(token_id|token_index|start_token_id)|pad_token_idx")


QWEN4_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# What the table of names cannot know, mostly defaults of transformers that do not build a model as they stand.
FIXES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"]},
    "inkling2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
    },
    "qwen4_exp_text": QWEN4_INDEXER,
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "xlm": {"emb_dim": D_MODEL},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 2 * D_MODEL,
        "attention_head_dim": 2 * D_MODEL // HEADS,
    },
    "zamba2": {
        "attention_hidden_size": 2 * D_MODEL,
        "attention_head_dim": 2 * D_MODEL // HEADS,
        "mamba_headdim": 2 * D_MODEL // 8,
    },
}


def tiny_config(model_type: str) -> Any:
    """A shrunken config of a model type of transformers; raises whatever the config class raises."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    fixes = FIXES.get(model_type, {})
    try:
        start = cls()
    except ValueError:  # a default that its own class refuses
        start = cls(**fixes)
    return cls(**_merged(_shrunk(start), fixes))


def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(a[k], b[k]) for k in a.keys() & b.keys() if isinstance(a[k], dict) and isinstance(b[k], dict)}
    return {**a, **b, **both}


def _shrunk(config: Any) -> dict[str, Any]:
    """Overrides for the constructor of the config's class."""
    config.allow_global_per_layer_attribute_access = True
    tokens = iter(range(3, VOCAB))
    fields = dict(_fields(config))
    out = _sizes(fields, tokens)
    for name, value in fields.items():
        if _is_config(value):
            out[name] = _shrunk(value)
    return {**out, **_layers(config, fields, out)}


def _sizes(fields: Mapping[str, Any], tokens: Iterator[int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if _TOKEN.fullmatch(name):
            out[name] = _token(name, value, tokens)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((s for pattern, s in SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and value > size:
                out[name] = size
        elif name == "intermediate_size" and isinstance(value, (list, tuple)):
            out[name] = [D_FF] * len(value)
    if "qk_rope_head_dim" in out and fields.get("head_dim") == fields["qk_rope_head_dim"]:  # one width, two names
        out["head_dim"] = out["qk_rope_head_dim"]
    if fields.get("num_key_value_heads") == fields.get("num_attention_heads") and "num_attention_heads" in out:
        out["num_key_value_heads"] = HEADS
    return out


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    for name in config.to_dict():
        if not name.startswith("_") and hasattr(config, name):
            yield name, getattr(config, name)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def _token(name: str, value: Any, free: Iterator[int]) -> Any:
    """An id inside the small vocabulary, a different one for each name."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name not in known and isinstance(value, int) and 0 <= value < VOCAB:
        return value
    return known.get(name) if name in known else next(free)


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _layers(config: Any, fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Per-layer lists cut to the fewest layers that show every value of each list."""
    total = next((fields[c] for c in _COUNTS if isinstance(fields.get(c), int)), 0)
    lists = {k: v for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == total > 2}
    lists = {k: v for k, v in lists.items() if len({repr(x) for x in v}) <= 6}
    special = {int(k): v for k, v in (config.to_dict().get("per_layer_config") or {}).items()}
    if special:
        lists["per_layer_config"] = [sorted(special.get(i, ())) for i in range(total)]
    if not lists:
        return {}
    picked = _pick(lists, total)
    count = {c: len(picked) for c in _COUNTS if c in chosen}
    cut: dict[str, Any] = {k: [v[i] for i in picked] for k, v in lists.items()}
    if special:
        kept = {new: _sizes(special[old], iter(())) for new, old in enumerate(picked) if old in special}
        cut["per_layer_config"] = {new: {**special[picked[new]], **sizes} for new, sizes in kept.items()}
    return {**count, **{k: chosen[k][: len(picked)] if k in chosen else v for k, v in cut.items()}}


def _pick(lists: Mapping[str, Any], total: int) -> list[int]:
    """The fewest layers (at least 2) in which every value of every list appears, greedily."""
    wanted = {(k, repr(x)) for k, v in lists.items() for x in v}
    picked: list[int] = []
    while wanted:
        best = max(range(total), key=lambda i: (len({(k, repr(v[i])) for k, v in lists.items()} & wanted), -i))
        wanted -= {(k, repr(v[best])) for k, v in lists.items()}
        picked.append(best)
    picked += [i for i in range(total) if i not in picked][: max(0, 2 - len(picked))]
    return sorted(picked)


def tiny_model(model_type: str, model_class: Any = None, seed: int = 0) -> nn.Module:
    """A tiny random model of a type, fp32, on the CPU, in eval mode. model_class: its causal LM where None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = tiny_config(model_type)
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not isinstance(config, model_class.config_class):  # a decoder that takes a part of the whole model's config
        config = next((v for _, v in _fields(config) if isinstance(v, model_class.config_class)), config)
    torch.manual_seed(seed)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class._from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{model_type} has {count / 1e6:.0f} M parameters after shrinking")
    model = model_class._from_config(config).float().eval()
    spread_weights(model, seed)
    return model  # type: ignore[no-any-return]


def causal_lms() -> list[str]:
    """Every model type in transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal_lm(model_type: str) -> Example:
    """A tiny causal LM with a prompt. It makes its own example inputs for transform, where it can."""
    model = tiny_model(model_type)
    config: Any = model.config
    rows = 2 * config.num_codebooks if model_type in CODEBOOKS else 2
    ids = torch.randint(3, 100, (rows, 11), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "use_cache": False}
    return Example(model=model, inputs=inputs, traced=inputs if model_type in CODEBOOKS else None)


CODEBOOKS = ("musicgen", "musicgen_melody")  # their prompt has one row for each codebook of a sequence


def spread_weights(model: nn.Module, seed: int = 0) -> None:
    """Weights at which every layer matters: the usual 0.02 makes an FFN of width 64 nearly invisible in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if type(module).__name__ in ("Linear", "Conv1D") and isinstance(weight, nn.Parameter) and weight.dim() == 2:
                fan_in = weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
                weight.copy_(torch.randn(weight.shape, generator=generator) * fan_in**-0.5)
                if isinstance(module.bias, nn.Parameter):
                    module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
