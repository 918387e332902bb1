"""What users pass as a batch, as a model takes it, and a run over batches.

An encoder and its decoder, and a tower that sees images, have inputs that are not the whole model's: `callable_parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError
from ltepass.progress import steps

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


T = TypeVar("T")
Batch = Tensor | Mapping[str, object] | Sequence[Tensor]  # a sequence of one tensor
TOKEN_INPUTS = frozenset("input_ids attention_mask token_type_ids position_ids decoder_input_ids labels".split())
EXPECTED = (
    "expected a tensor of token ids, or a mapping of the model's inputs to tensors, as a tokenizer gives with "
    "return_tensors='pt'"
)
MIN_TOKENS = 512  # of every nth batch, where the batches hold as many


def inputs_of(model: nn.Module, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Positional and named arguments for `model`, on its device, without labels.

    batch: token ids, alone or as the only tensor of a list; any Mapping of inputs. Labels stay for an encoder-decoder
    alone: its decoder's inputs are made of them, and they tell its padding. Raises CalibrationError for anything else.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 1 and isinstance(batch[0], Tensor):
        batch = batch[0]  # as a DataLoader over a TensorDataset has it
    device = _device_of(model)
    if isinstance(batch, Tensor) and batch.dim() == 1 and hasattr(model, "get_input_embeddings"):
        raise CalibrationError(
            f"a batch is a tensor of one dimension ({len(batch)} token ids); expected [sequences, tokens]; pass a list "
            "of batches, as [ids] for one"
        )
    if isinstance(batch, Tensor):
        return (batch.to(device),), {}
    batch = mapping_of(batch)
    drop = () if _has_decoder(model) else ("labels",)
    named = {name: value for name, value in batch.items() if name not in drop}
    for name, value in named.items():
        if _is_text(value) or (name in TOKEN_INPUTS and isinstance(value, (list, tuple))) or _is_array(value):
            raise CalibrationError(f"{name!r} of a batch is {_seen(value)}; {EXPECTED}")
    return (), {name: v.to(device) if isinstance(v, Tensor) else v for name, v in named.items()}


def mapping_of(batch: object) -> Mapping[str, object]:
    """Raises CalibrationError for what is no mapping."""
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"a batch is {_seen(batch)}; {EXPECTED}")
    return batch


def fewest_logits(model: nn.Module, named: Mapping[str, object]) -> dict[str, Tensor]:
    """What makes a language model compute the last token's logits only: a fifth of a pass on SmolLM2-135M."""
    heads = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if not heads or "labels" in named or "logits_to_keep" not in signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor([-1], device="cpu")}  # for an int, Gemma 4 drops tokens before its last FFNs


def no_cache(model: nn.Module) -> dict[str, bool]:
    """What makes a language model keep no keys and values: half a gigabyte of 1,024 tokens of a 7B model in bf16."""
    return {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}


def is_empty(batch: Batch) -> bool:
    """Whether its token ids hold no token: models fail on such a batch, and there is nothing to see in it."""
    tokens = _tokens(batch)
    return isinstance(tokens, Tensor) and tokens.numel() == 0


def tokens_in(batch: Batch) -> int:
    """Tokens that are no padding; 0 for a batch that names its tokens in a way of its own."""
    tokens, mask = _tokens(batch), batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(tokens, Tensor):
        return 0
    ids = tokens[..., 0] if tokens.is_floating_point() else tokens
    return int((mask > 0).sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def _tokens(batch: Batch) -> object:
    if isinstance(batch, Mapping):
        return batch.get("input_ids", batch.get("inputs_embeds"))
    return batch[0] if isinstance(batch, (list, tuple)) and len(batch) == 1 else batch


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(v, str) for v in value))


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy"


def _seen(value: object) -> str:
    """For a message: what a batch, or a part of it, is."""
    if isinstance(value, str):
        return f"the text {value[:20]!r}"
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {len(value)} ({_seen(value[0])} first)"
    return f"a {type(value).__name__}"


def _device_of(model: nn.Module) -> torch.device | None:
    """Where the model reads its inputs; None, which moves nothing, where that is no real device."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)
    try:
        first = next((embeddings() or model).parameters(), None)
    except NotImplementedError:  # a model that reads no tokens
        first = next(model.parameters(), None)
    return None if first is None or first.is_meta else first.device


def run_batches(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Forward passes for what hooks see, without gradients, in eval mode; the training flags are as before afterwards.

    Nobody reads a language model's logits, nor its keys and values: as few as it can are made. Batches without a token
    are passed by. Raises CalibrationError for a batch that is no model input.
    """
    flags = {m: m.training for m in model.modules()}
    for module in flags:
        module.training = False  # an exported module has no eval()
    try:
        with torch.no_grad():
            for batch in steps("passing text through the model", batches):
                if is_empty(batch):
                    continue
                args, named = inputs_of(model, batch)
                model(*args, **no_cache(model) | fewest_logits(model, named) | named)
    finally:
        for module, flag in flags.items():
            module.training = flag


def every(nth: int, batches: Sequence[Any]) -> Sequence[Any]:
    """Every nth of the batches, or more of them where those hold fewer than MIN_TOKENS."""
    parts = (batches[::step] for step in range(nth, 1, -1))
    return next((some for some in parts if sum(map(tokens_in, some)) >= MIN_TOKENS), batches)


def on_every(nth: int, batches: Sequence[Any], run: Callable[[Sequence[Any]], T]) -> T:
    """What a run over every nth batch gives, or over all where those pass an FFN by."""
    some = every(nth, batches)
    try:
        return run(some)
    except CalibrationError:
        if len(some) == len(batches):
            raise
        return run(batches)
