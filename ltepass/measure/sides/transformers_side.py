"""A model of transformers under `generate`: as it is, lowered, or with its linears quantised by torchao."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ltepass.config import Scope
from ltepass.kernels.read_pass import read_pass
from ltepass.kernels.weight_formats import BLOCK
from ltepass.measure import token_bytes
from ltepass.measure.quality import perplexity
from ltepass.measure.sides.side import DTYPES, Engine, Facts, Sparse
from ltepass.measure.sparsity import sparsity_of_tail
from ltepass.measure.timing import time_generate
from ltepass.routed.modes import remember_densities
from ltepass.routed.routed import Routed, is_transformed
from ltepass.sparsity.thresholds import set_sparsity
from ltepass.transform_and_lower import lower, remove, unlower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["eager", "compiled"]
Quantised = Literal["int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Transformers:
    """A model of transformers under `generate`.

    load: gives it; routed: with its routers. lowered: by us, as a routed one always is; else as transformers runs it.
    sparsity: for the knob; None leaves the thresholds as they were saved. quantised: the weights of linears, by
    torchao, of a model without routers.
    """

    load: Callable[[], PreTrainedModel]
    routed: bool
    lowered: bool = False
    sparsity: float | None = None
    how: How = "eager"
    quantised: Quantised | None = None

    @property
    def name(self) -> str:
        return "ltepass" if self.routed else "ltepass, dense" if self.lowered else "transformers"

    def imports(self) -> None:
        import transformers  # noqa: F401

    def open(self, length: int) -> Engine:
        return TransformersEngine(self)


class TransformersEngine:
    def __init__(self, side: Transformers) -> None:
        self._side, self._model = side, side.load()
        scope: Scope = "ffn" if side.how == "eager" else "model"
        if not side.routed and is_transformed(self._model):
            remove(self._model)
        if side.quantised is not None:
            quantise(self._model, side.quantised)
        if side.sparsity is not None:
            set_sparsity(self._model, side.sparsity)
        if side.routed or side.lowered:
            lower(self._model, scope=scope, ffn=side.routed)
        elif side.how == "compiled":
            self._model.compile()
            self._model.generation_config.cache_implementation = "static"

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        return time_generate(self._model, prompt.to(self._model.device), tokens.to(self._model.device))

    def read_pass(self) -> tuple[int, float]:
        weights = token_bytes.buffers(self._model)
        start = time.perf_counter()
        read_pass(weights)
        return sum(tensor.nbytes for tensor in weights), time.perf_counter() - start

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        model, ids = self._model, ids.to(self._model.device)
        sparse = self.sparse(ids, prompt_tokens)
        plain = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
        format: str = self._side.quantised or plain
        return Facts(
            how=f"{self._side.how}, generate",
            format=format,
            head=format,
            weight_bytes=token_bytes.weights_read(model, sparse.get("active", 1.0)),
            held_bytes=token_bytes.held(model),
            position_bytes=token_bytes.position_bytes(model, ids[:prompt_tokens]),
            perplexity=perplexity(model, blocks),
            **sparse,
        )

    def set_thresholds(self, thresholds: Mapping[str, Tensor]) -> None:
        """Other thresholds, by the router's path in the model."""
        for path, threshold in thresholds.items():
            self._model.get_submodule(path).threshold.copy_(threshold)
        remember_densities(Routed.of(self._model, "bench model"))

    def sparse(self, ids: Tensor, prompt_tokens: int) -> Sparse:
        """What routers add to the facts of a model of transformers, which is as before `lower` then and computes the
        same.
        """
        if not is_transformed(self._model):
            return {}
        routed = Routed.of(self._model, "bench model")
        state, densities = routed.state, [router.density for router in routed.routers]
        known = [density for density in densities if density is not None]
        unlower(self._model)
        return {
            # What the thresholds stand for: the knob may have moved them since the model was trained.
            "sparsity": round(1 - fmean(known), 2) if known else float(state.config["target_sparsity"]),
            "active": 1 - sparsity_of_tail(self._model, ids, prompt_tokens),
            "router": str(state.config.get("router", "linear")),  # older entries have no such key
            "router_share": token_bytes.router_share(self._model, state.sites),
            "group_size": state.sites[0].group_size,
        }


def quantise(model: PreTrainedModel, weights: Quantised) -> None:
    """By torchao, in place: int8 with a scale an output, int4 in blocks of 32; rounded to nearest."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    configs = {
        "int8": partial(Int8WeightOnlyConfig, version=2),
        "int4": partial(IntxWeightOnlyConfig, weight_dtype=torch.int4, granularity=PerGroup(BLOCK)),  # type: ignore[attr-defined]
    }
    quantize_(model, configs[weights]())
