"""Tiny models beside the causal LMs: encoder-decoders, encoders, vision, time series, and decoders in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.coverage.examine import Example
from examples.coverage.plain_models import FF, VOCAB, D, TorchDecoder, TorchEncoder, gpt_fast, nano_gpt
from examples.coverage.zoo import spread_weights

BATCH, TOKENS = 2, 12


def _randn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def _example(model: nn.Module, inputs: dict[str, Any]) -> Example:
    spread_weights(model.eval())
    return Example(model=model, inputs=inputs, traced=inputs)


def _hf(kind: str, model: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Callable[[], Example]:
    """kind: the config's class name without "Config"; model: the model's class name."""

    def make() -> Example:
        import transformers

        torch.manual_seed(0)
        return _example(getattr(transformers, model)(getattr(transformers, f"{kind}Config")(**config)), inputs())

    return make


def _text() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _text_to_text() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(7), "use_cache": False}


def _speech() -> dict[str, Any]:
    return {"input_features": _randn(BATCH, 8, 2 * TOKENS), "decoder_input_ids": _ids(7), "use_cache": False}


def _image() -> dict[str, Any]:
    return {"pixel_values": _randn(BATCH, 3, 16, 16)}


def _series() -> dict[str, Any]:
    return {"past_values": _randn(BATCH, 16, 2)}


def _series_with_time(past: int = 10) -> dict[str, Any]:
    """past: the context of 8 and the longest lag."""
    past_times, future_times = _randn(BATCH, past, 2), _randn(BATCH, 4, 2)
    values = {"past_values": _randn(BATCH, past), "past_observed_mask": torch.ones(BATCH, past)}
    times = {"past_time_features": past_times, "future_time_features": future_times}
    return {**values, **times, "future_values": _randn(BATCH, 4)}


def _episodes() -> dict[str, Any]:
    return {
        "states": _randn(BATCH, 4, 5),
        "actions": _randn(BATCH, 4, 3),
        "rewards": _randn(BATCH, 4, 1),
        "returns_to_go": _randn(BATCH, 4, 1),
        "timesteps": torch.arange(4).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 4, dtype=torch.long),
    }


_T5 = {"vocab_size": VOCAB, "d_model": D, "d_kv": 8, "d_ff": FF, "num_layers": 2, "num_heads": 4}
_SIDES = {
    f"{side}_{field}": value
    for side in ("encoder", "decoder")
    for field, value in {"layers": 2, "attention_heads": 4, "ffn_dim": FF}.items()
}
_BART = {"vocab_size": VOCAB, "d_model": D, "max_position_embeddings": 64, **_SIDES}
_LAYERS = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": FF}
_BERT = {"vocab_size": VOCAB, "max_position_embeddings": 64, **_LAYERS}
_IMAGE = {**_LAYERS, "image_size": 16, "patch_size": 4}
_SERIES = {"d_model": D, "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 2}
_PATCHES = {
    "num_input_channels": 2,
    "context_length": 16,
    "prediction_length": 4,
    "patch_length": 4,
    "d_model": D,
}


def _plain(make: Callable[[], nn.Module]) -> Callable[[], Example]:
    def example() -> Example:
        torch.manual_seed(0)
        return _example(make(), _text())

    return example


FAMILIES: dict[str, Callable[[], Example]] = {
    "T5": _hf("T5", "T5ForConditionalGeneration", _text_to_text, **_T5),
    "T5 v1.1": _hf("T5", "T5ForConditionalGeneration", _text_to_text, feed_forward_proj="gated-gelu", **_T5),
    "mT5": _hf("MT5", "MT5ForConditionalGeneration", _text_to_text, **_T5),
    "BART": _hf("Bart", "BartForConditionalGeneration", _text_to_text, **_BART),
    "Marian": _hf("Marian", "MarianMTModel", _text_to_text, pad_token_id=0, **_BART),
    "Pegasus": _hf("Pegasus", "PegasusForConditionalGeneration", _text_to_text, **_BART),
    "Whisper": _hf(
        "Whisper",
        "WhisperForConditionalGeneration",
        _speech,
        vocab_size=VOCAB,
        d_model=D,
        num_mel_bins=8,
        max_source_positions=TOKENS,
        max_target_positions=16,
        pad_token_id=0,
        **_SIDES,
    ),
    "BERT": _hf("Bert", "BertForMaskedLM", _text, **_BERT),
    "RoBERTa": _hf("Roberta", "RobertaForMaskedLM", _text, **_BERT),
    "DeBERTa": _hf("Deberta", "DebertaForMaskedLM", _text, **_BERT),
    "DeBERTa v2": _hf("DebertaV2", "DebertaV2ForMaskedLM", _text, **_BERT),
    "ModernBERT": _hf("ModernBert", "ModernBertForMaskedLM", _text, pad_token_id=0, **_BERT),
    "MiniLM": _hf("Bert", "BertModel", _text, **{**_BERT, "num_attention_heads": 8, "intermediate_size": 4 * D}),
    "ViT": _hf("ViT", "ViTForImageClassification", _image, **_IMAGE),
    "Swin": _hf(
        "Swin",
        "SwinForImageClassification",
        _image,
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "DINOv2": _hf("Dinov2", "Dinov2ForImageClassification", _image, mlp_ratio=2, **_IMAGE),
    "DINOv2 SwiGLU": _hf("Dinov2", "Dinov2ForImageClassification", _image, mlp_ratio=2, use_swiglu_ffn=True, **_IMAGE),
    "SegFormer": _hf(
        "Segformer",
        "SegformerForSemanticSegmentation",
        _image,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, D],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "TimeSeriesTransformer": _hf(
        "TimeSeriesTransformer", "TimeSeriesTransformerForPrediction", _series_with_time, **_SERIES, **_SIDES
    ),
    "Informer": _hf("Informer", "InformerForPrediction", _series_with_time, **_SERIES, **_SIDES),
    "Autoformer": _hf(
        "Autoformer",
        "AutoformerForPrediction",
        _series_with_time,
        moving_average=3,
        label_length=4,
        **_SERIES,
        **_SIDES,
    ),
    "PatchTST": _hf(
        "PatchTST",
        "PatchTSTForPrediction",
        _series,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=FF,
        patch_stride=4,
        **_PATCHES,
    ),
    "PatchTSMixer": _hf("PatchTSMixer", "PatchTSMixerForPrediction", _series, num_layers=2, patch_stride=4, **_PATCHES),
    "Decision Transformer": _hf(
        "DecisionTransformer",
        "DecisionTransformerModel",
        _episodes,
        state_dim=5,
        act_dim=3,
        hidden_size=D,
        n_layer=2,
        n_head=4,
        n_inner=FF,
        max_ep_len=16,
    ),
    "torch.nn.TransformerDecoderLayer": _plain(TorchDecoder),
    "torch.nn.TransformerEncoderLayer": _plain(TorchEncoder),
    "nanoGPT style": _plain(nano_gpt),
    "gpt-fast style": _plain(gpt_fast),
}
