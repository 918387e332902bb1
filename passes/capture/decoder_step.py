"""A language model of transformers as one graph: some tokens and a static cache in, the last token's logits out.

    step(ids [1, T] int64, position [] int64, cache [layers, 2, 1, kv_heads, length, size]) -> logits [1, 1, vocab]

The tokens stand at `position` and behind it; T is a symbol. Attention is `ltepass::cached_attention`, which writes to
the cache: transformers lets a model take another attention function, and ours gets keys before they are stored.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ltepass.errors import ExportError
from ltepass.kernels import attention as _attention  # noqa: F401 -- registers the op that stands in the graph
from ltepass.kernels.weight_formats import Parts
from ltepass.passes.capture.leave_untouched import untouched
from ltepass.routed.torchao_weights import floats_of, holds_codes, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

WITHIN = "model"  # what the graph's names of the model's own tensors begin with
# What models hand on to attention beside what the op has an argument for, and that changes nothing in inference.
HARMLESS = frozenset("dropout is_causal position_ids use_cache cache_position output_attentions training".split())


@dataclass(frozen=True)
class DecoderStep:
    """graph: computes the step. inputs: of an example call, two tokens; the cache says its shape and dtype.

    codes: by the names of leaves, which hold floats: what the model has there.
    """

    graph: GraphModule
    inputs: tuple[Tensor, Tensor, Tensor]
    codes: dict[str, Parts]

    @property
    def cache(self) -> Tensor:
        return self.inputs[2]


def capture_step(model: PreTrainedModel, length: int, cache_dtype: torch.dtype | None = None) -> DecoderStep:
    """The model's step over a cache of `length` tokens. Nothing of the model changes. Raises ExportError."""
    ids, position = torch.zeros(1, 2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    inputs = (ids, position, _empty_cache(model, length, cache_dtype))
    tokens = torch.export.Dim("tokens", min=2, max=length)
    shapes = {"ids": {1: tokens}, "position": None, "cache": None}
    step = _Step(_with_the_same_tensors(model))
    codes = _in_floats(step)
    try:
        with untouched(step), _attention_of(step), torch.no_grad():
            step.eval()
            program = torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)
    except (ExportError, MemoryError):
        raise
    except Exception as e:
        said = next((line for line in str(e).splitlines() if line.strip()), "")
        raise ExportError(f"torch.export could not trace a step of {type(model).__name__}: {said}") from e
    step.check(inputs[2].shape[0])
    graph = program.module(check_guards=False)
    assert isinstance(graph, GraphModule), "what export gives back"
    return DecoderStep(graph, inputs, codes)


def _with_the_same_tensors(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to trace: whoever calls the model meanwhile finds its own attention, and so does one after a Ctrl-C."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _in_floats(step: nn.Module) -> dict[str, Parts]:
    """Puts floats in the place of torchao's weights, which no trace reads. Returns their codes by name."""
    held = {name: p for name, p in step.named_parameters(remove_duplicate=False) if holds_codes(p)}
    codes = {id(p): parts_of(p) for p in held.values()}
    floats = {id(p): nn.Parameter(floats_of(codes[id(p)]).to(p.dtype), False) for p in held.values()}
    for module in step.modules():
        module._parameters.update({name: floats[id(p)] for name, p in module._parameters.items() if id(p) in floats})
    return {name: codes[id(p)] for name, p in held.items()}


def _empty_cache(model: PreTrainedModel, length: int, dtype: torch.dtype | None) -> Tensor:
    config = model.config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        raise ExportError(
            f"{type(config).__name__} names no attention heads; expected a decoder that attends to a cache"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.zeros(config.num_hidden_layers, 2, 1, heads, length, size, dtype=dtype or model.dtype)


@dataclass
class _Call:
    """What attention functions of one trace take: the step's inputs, and the layer whose keys came last."""

    cache: Tensor | None = None
    position: Tensor | None = None
    layer: int | None = None
    seen: list[int] = field(default_factory=list)


class _Step(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.call = _Call()
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, ids: Tensor, position: Tensor, cache: Tensor) -> Tensor:
        self.call.position, self.call.cache, self.call.layer, self.call.seen = position, cache, None, []
        places = (torch.arange(ids.shape[1]) + position)[None]
        more = {"logits_to_keep": 1} if self.last_only else {}
        memory = _memory(self.call)
        out = self.model(input_ids=ids, position_ids=places, past_key_values=memory, use_cache=True, **more)
        logits: Tensor = out.logits[:, -1:]
        return logits

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """An attention function as transformers' `AttentionInterface` has them."""
        call, name = self.call, type(module).__name__
        told = sorted(key for key, value in others.items() if key not in HARMLESS and value not in (None, False))
        told += ["a mask of its own"] if mask is not None else []
        told += ["no causal order"] if others.get("is_causal", getattr(module, "is_causal", True)) is False else []
        if told:
            raise ExportError(f"{name} has {', '.join(told)}; expected causal attention with a window at most")
        if call.layer is None:
            raise ExportError(f"{name} attends to keys that are in no cache; expected self-attention, a cache a layer")
        assert call.cache is not None, "forward set it"
        assert call.position is not None, "forward set it"
        layer, call.layer = call.layer, None
        call.seen.append(layer)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        op = torch.ops.ltepass.cached_attention
        return op(q, k, v, call.cache, layer, call.position, scale, sliding_window), None

    def check(self, layers: int) -> None:
        """Raises ExportError unless each layer of the traced step attended by our function, once."""
        if sorted(self.call.seen) != list(range(layers)):
            seen = f"{len(self.call.seen)} of {layers} layers of {type(self.model).__name__} took it"
            raise ExportError(f"{seen}; expected every layer to attend through transformers' AttentionInterface")


def _memory(call: _Call) -> Cache:
    """A cache that stores nothing: our attention op does. It remembers whose keys come next."""
    from transformers.cache_utils import Cache

    class Memory(Cache):  # type: ignore[misc]  # transformers leaves it untyped
        def update(
            self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
        ) -> tuple[Tensor, Tensor]:
            call.layer = layer_idx
            return keys, values

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return query_length, 0

        def get_max_length(self, layer_idx: int | None = None) -> int:
            return -1

    return Memory(layers=[])


@contextmanager
def _attention_of(step: _Step) -> Iterator[None]:
    """Its model attends by `step.attend`, and makes no mask: none is registered under its name."""
    from transformers import AttentionInterface

    name = f"ltepass_step_{id(step)}"
    AttentionInterface.register(name, step.attend)
    try:
        for module in step.modules():
            config = getattr(module, "config", None)
            if config is not None:
                config._attn_implementation = name
        yield
    finally:
        AttentionInterface._global_mapping.pop(name, None)
