"""Parts of a model whose inputs are not the whole model's: an encoder and its decoder, a tower that sees images."""

from __future__ import annotations

from inspect import signature
from typing import Literal

from torch import nn

Part = Literal["whole", "encoder", "decoder"]  # of a model
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def callable_parts(model: nn.Module) -> list[nn.Module]:
    """The model, and what others may call in its place: a base model, an encoder or decoder by itself."""
    parts = (model, getattr(model, "base_model", None), _part(model, "encoder"), _part(model, "decoder"))
    return list(dict.fromkeys(part for part in parts if isinstance(part, nn.Module)))


def encoder_and_decoder(model: nn.Module) -> dict[Part, nn.Module]:
    """Both, of a model whose decoder reads other tokens than its encoder; else nothing."""
    encoder, decoder = _part(model, "encoder"), _part(model, "decoder")
    if encoder is None or decoder is None or not set(DECODER_INPUTS) & set(signature(model.forward).parameters):
        return {}
    if encoder in decoder.modules() or decoder in encoder.modules():
        return {}  # BLIP-2 calls a whole language model its encoder
    return {"encoder": encoder, "decoder": decoder}


def _part(module: nn.Module, name: str) -> nn.Module | None:
    """A model's encoder or decoder, the innermost that it names so; None where that is the model itself."""
    found = module
    while True:
        get = getattr(found, f"get_{name}", None)
        inner = get() if callable(get) else getattr(found, name, None)
        if inner is found or not isinstance(inner, nn.Module):
            return None if found is module else found
        found = inner
