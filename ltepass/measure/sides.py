"""What takes turns in a benchmark of one token: descriptions to send to a process, and what they open there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

import torch
from torch import Tensor

from ltepass.api import lower, remove, unlower
from ltepass.config import Scope
from ltepass.errors import ConfigError
from ltepass.exporting.decoder import ExportedDecoder, greedy
from ltepass.kernels.linear_reference import BLOCK
from ltepass.kernels.read_pass import read_pass
from ltepass.measure import gguf_file, llama_cpp, token_bytes
from ltepass.measure.decoding import time_generate
from ltepass.measure.quality import perplexity, perplexity_of, sparsity_of_tail
from ltepass.routed.routed import Routed, is_transformed
from ltepass.sparsity.thresholds import set_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = Literal["eager", "compiled"]
Quantised = Literal["int8", "int4"]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one side: what a row says beside the times. position_bytes: of keys and values, for each earlier token."""

    how: str
    format: str
    head: str
    weight_bytes: float
    position_bytes: float
    perplexity: float
    sparsity: float = 0.0
    active: float = 1.0
    router: str = ""
    router_share: float = 0.0
    group_size: int = 0


class Sparse(TypedDict, total=False):
    """Of Facts, what a dense side lacks."""

    sparsity: float
    active: float
    router: str
    router_share: float
    group_size: int


class Engine(Protocol):
    """A model in memory that runs."""

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        """Seconds that each given token took, the first of which comes out of the prompt."""

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        """ids: prompt and timed tokens, [T]; blocks: [n, T'] for the perplexity. Comes last: nothing is timed after."""

    def read_pass(self) -> tuple[int, float]:
        """Bytes of the weights, and the seconds of reading them once."""


class Side(Protocol):
    """name: of the program. Sent to a process of its own."""

    @property
    def name(self) -> str: ...

    def imports(self) -> None:
        """What memory is counted after."""

    def open(self, length: int) -> Engine:
        """length: tokens that a call sees at most."""


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
        return _TransformersEngine(self)


class _TransformersEngine:
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
            position_bytes=token_bytes.position_bytes(model, ids[:prompt_tokens]),
            perplexity=perplexity(model, blocks),
            **sparse,
        )

    def sparse(self, ids: Tensor, prompt_tokens: int) -> Sparse:
        """What a model with routers adds; it is as before `lower` then, which computes the same."""
        if not is_transformed(self._model):
            return {}
        state = Routed.of(self._model, "bench model").state
        unlower(self._model)
        wanted = self._side.sparsity
        return {
            "sparsity": float(state.config["target_sparsity"]) if wanted is None else wanted,
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


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder of `ltepass export`. source: the model that it was made of, where that has routers: how sparse it is."""

    folder: Path
    source: Transformers | None = None
    name: str = "ltepass, exported"

    def imports(self) -> None:
        pass

    def open(self, length: int) -> Engine:
        return _ExportedEngine(self)


class _ExportedEngine:
    def __init__(self, side: Exported) -> None:
        self._side, self._decoder = side, ExportedDecoder(side.folder)

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        self._decoder.reset()
        stamps = [time.perf_counter()]
        for step in (prompt.tolist(), *([token] for token in tokens.tolist()[:-1])):
            greedy(self._decoder(step))
            stamps.append(time.perf_counter())
        return [b - a for a, b in pairwise(stamps)]

    def read_pass(self) -> tuple[int, float]:
        start = time.perf_counter()
        read_pass(self._decoder.weights)
        return sum(tensor.nbytes for tensor in self._decoder.weights), time.perf_counter() - start

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        about, source = self._decoder.about, self._side.source
        sparse: Sparse = {} if source is None else _TransformersEngine(source).sparse(ids, prompt_tokens)
        plain = next(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{about.dtype}")
        layers, _, _, heads, _, size = about.cache
        return Facts(
            how="exported, greedy",
            format=plain if about.linears is None else f"{plain}, linears {about.linears}" if source else about.linears,
            head=about.linears or plain,
            weight_bytes=about.token_bytes + sparse.get("active", 1.0) * about.gated_bytes,
            position_bytes=2 * layers * heads * size * self._decoder.cache.element_size(),
            perplexity=perplexity_of(self._logits, blocks),
            **sparse,
        )

    def _logits(self, ids: Tensor) -> Tensor:
        """[T, vocab] of ids [T]: through the decode step, which a package has for one token at a time."""
        self._decoder.reset()
        return torch.stack([self._decoder([token]) for token in ids.tolist()])


@dataclass(frozen=True, kw_only=True)
class LlamaCpp:
    """A GGUF file under llama.cpp, its logits read and their largest found after each token."""

    path: Path
    name: str = "llama.cpp"

    def imports(self) -> None:
        llama_cpp.library()

    def open(self, length: int) -> Engine:
        return _LlamaCppEngine(self.path, length)


class _LlamaCppEngine:
    def __init__(self, path: Path, length: int) -> None:
        self._path, self._model = path, llama_cpp.LlamaCpp(path, threads=torch.get_num_threads(), length=length)

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        self._model.forget()
        stamps = [time.perf_counter()]
        for step in (prompt.tolist(), *([token] for token in tokens.tolist()[:-1])):
            self._model.read(step)
            self._model.next_token()
            stamps.append(time.perf_counter())
        return [b - a for a, b in pairwise(stamps)]

    def read_pass(self) -> tuple[int, float]:
        raise ConfigError("the weights inside llama.cpp cannot be read from outside; add a side of ours")

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        format, head = gguf_file.formats(self._path)
        return Facts(
            how=llama_cpp.system_info(),
            format=format,
            head=head,
            weight_bytes=gguf_file.bytes_read(self._path),
            position_bytes=gguf_file.position_bytes(self._path),
            perplexity=perplexity_of(self._model.logits, blocks),
        )
