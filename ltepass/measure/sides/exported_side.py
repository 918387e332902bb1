"""A folder of `ltepass export`, which decodes by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ltepass.exporting.run_exported import ExportedDecoder, greedy
from ltepass.kernels.read_pass import read_pass
from ltepass.kernels.weight_formats import SparseFormat
from ltepass.measure.quality import perplexity_of
from ltepass.measure.sides.side import DTYPES, Engine, Facts, Sparse
from ltepass.measure.sides.transformers_side import Transformers, TransformersEngine


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder of `ltepass export`. source: the model that it was made of, where that has routers: how sparse it is."""

    folder: Path
    source: Transformers | None = None
    name: str = "ltepass, exported"

    def imports(self) -> None:
        import torch._inductor.codecache
        import torch.export.pt2_archive._package  # noqa: F401

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
        about, sparse = self._decoder.about, self._sparse(ids, prompt_tokens)
        names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
        plain, head = names[about.dtype], about.head or about.linears or about.dtype
        half = bool(sparse) and about.linears not in get_args(SparseFormat)  # FFNs are as they were then
        layers, _, _, heads, _, size = about.cache
        return Facts(
            how="exported, greedy" + ("" if about.cache_dtype == about.dtype else f", cache {about.cache_dtype}"),
            format=plain if about.linears is None else f"{plain}, linears {about.linears}" if half else about.linears,
            head=names.get(head, head),
            weight_bytes=about.token_bytes + sparse.get("active", 1.0) * about.gated_bytes,
            held_bytes=sum(tensor.nbytes for tensor in self._decoder.weights),
            position_bytes=2 * layers * heads * size * self._decoder.cache.element_size(),
            perplexity=perplexity_of(partial(logits_of_steps, self._decoder), blocks),
            **sparse,
        )

    def _sparse(self, ids: Tensor, prompt_tokens: int) -> Sparse:
        """What the model that the folder was made of does at the folder's thresholds."""
        if self._side.source is None:
            return {}
        engine = TransformersEngine(self._side.source)
        engine.set_thresholds(self._decoder.thresholds)
        return engine.sparse(ids, prompt_tokens)


def logits_of_steps(decoder: ExportedDecoder, ids: Tensor) -> Tensor:
    """[T, vocab] of ids [T]: through the decode step, which a package has for one token at a time."""
    decoder.reset()
    return torch.stack([decoder([token]) for token in ids.tolist()])
