"""A dense causal LM of transformers as a GGUF file, so that llama.cpp runs the very same weights.

Token ids are given, never text: the file holds no vocabulary. What of a model would change the result without a place
in the file is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel

FORMATS = ("F32", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M")
# llama.cpp never gives the head 4 bits: quality goes with it, and a tied head is the embedding too.
HEAD = {"Q4_0": "Q8_0", "Q4_1": "Q8_0", "Q4_K_M": "Q6_K"}
Q4_K_M_WIDTH = 256  # weights of a block


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a family. interleaved: rope pairs neighbours, not halves; factors: it reads rope_freqs."""

    name: str
    interleaved: bool = False
    factors: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, factors=True),
    "mistral": Architecture("llama", interleaved=True, factors=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def check(config: PreTrainedConfig, format: str) -> None:
    """Raises ConfigError where llama.cpp cannot run such a model, or not in this format, with the reason."""
    if format not in FORMATS:
        raise ConfigError(f"the format is {format!r}; expected one of {', '.join(FORMATS)}")
    known = ARCHITECTURES.get(config.model_type)
    if known is None:
        raise ConfigError(
            f"a model of type {config.model_type!r} cannot be written as GGUF; expected one of "
            f"{', '.join(ARCHITECTURES)}; leave out --against"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"the activation is {config.hidden_act!r}; llama.cpp's {known.name} knows silu alone")
    widths = {config.hidden_size, config.intermediate_size, config.num_attention_heads * _head_dim(config)}
    block = {"F32": 1, "BF16": 1, "Q4_K_M": Q4_K_M_WIDTH}.get(format, 32)
    if odd := sorted(width for width in widths if width % block):
        raise ConfigError(f"a width of the model is {odd[0]}; {format} expects multiples of {block}; leave it out")


def write(model: PreTrainedModel, path: Path, format: str) -> None:
    """Writes a dense model: matrices in `format`, the head in HEAD's where it names one, vectors in F32.

    model: of one of ARCHITECTURES, without routers (`ltepass.remove`). format: of FORMATS, but Q4_K_M: no Python code
    writes it, llama.cpp makes it of an F32 file. Raises ConfigError before anything is written.
    """
    import gguf

    check(model.config, format)
    assert format != "Q4_K_M", "llama.cpp itself makes Q4_K_M"
    known, config = ARCHITECTURES[model.config.model_type], model.config
    tensors = list(_tensors(model, known))
    writer = gguf.GGUFWriter(path, known.name)
    _describe(writer, config)
    for name, tensor in tensors:
        kind = gguf.GGMLQuantizationType[_format_of(name, tensor, format, tied=config.tie_word_embeddings)]
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _format_of(name: str, tensor: Tensor, format: str, *, tied: bool) -> str:
    head = "token_embd.weight" if tied else "output.weight"
    return "F32" if tensor.ndim == 1 else HEAD.get(format, format) if name == head else format


def _describe(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _tensors(model: PreTrainedModel, known: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Names of GGUF and values in fp32, in the order of use. Raises ConfigError at a tensor without a GGUF name."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[known.name.upper()], config.num_hidden_layers)
    factors = rope_factors(model)
    if factors is not None and not known.factors:
        raise ConfigError(
            f"the rope is scaled ({config.rope_parameters['rope_type']}); llama.cpp's {known.name} reads no factors"
        )
    if factors is not None:
        yield "rope_freqs.weight", factors
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"the tensor {name} has no name in GGUF; expected a plain model of its family")
        yield found, _ordered(name, value.detach().float().cpu(), config, known)


def _ordered(name: str, value: Tensor, config: PreTrainedConfig, known: Architecture) -> Tensor:
    """Rows of q and k as llama.cpp turns them: pair i of a head lies at 2i and 2i + 1, not at i and i + half."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if not known.interleaved or heads is None:
        return value.contiguous()
    pairs: Tensor = value.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return pairs.reshape(value.shape).contiguous()


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """What each rotary frequency is divided by; None where theta alone gives it. Raises ConfigError at other ropes."""
    rotary, width = model.model.rotary_emb, _head_dim(model.config)
    frequencies = rotary.inv_freq.float().cpu()
    kind = model.config.rope_parameters["rope_type"]
    if kind in ("dynamic", "longrope") or rotary.attention_scaling != 1 or len(frequencies) != width // 2:
        raise ConfigError(f"the rope is of type {kind!r}; GGUF takes plain ones and those of constant factors")
    theta = model.config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return None if torch.allclose(plain, frequencies, rtol=1e-5) else plain / frequencies


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def bytes_read(path: Path) -> int:
    """Bytes of weights that one token reads: all, but one row of an embedding that is no head."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    if "output.weight" in tensors:
        embedding = tensors["token_embd.weight"]
        total -= int(embedding.n_bytes) - int(embedding.n_bytes) // int(embedding.shape[1])
    return total


def formats(path: Path) -> tuple[str, str]:
    """Of a GGUF file: the formats of the first layer's FFN and of the head."""
    import gguf

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    return kinds["blk.0.ffn_up.weight"], kinds.get("output.weight", kinds["token_embd.weight"])


def position_bytes(path: Path) -> int:
    """Bytes of keys and values of one position, in llama.cpp's f16."""
    import gguf

    # keys without the architecture's name before them
    found = {name.partition(".")[2]: field for name, field in gguf.GGUFReader(path).fields.items()}
    heads, width = (int(found[name].contents()) for name in ("attention.head_count", "embedding_length"))
    usual = {"attention.head_count_kv": heads, "attention.key_length": width // heads}
    usual["attention.value_length"] = usual["attention.key_length"]
    kept, key, value = (int(found[name].contents()) if name in found else n for name, n in usual.items())
    return 2 * int(found["block_count"].contents()) * kept * (key + value)


def vocabulary(path: Path) -> int:
    """Tokens that the file's model knows."""
    import gguf

    (table,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    return int(table.shape[1])
