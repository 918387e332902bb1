"""The same weights under llama.cpp, the program that one would pick instead."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ConfigError
from ltepass.measure import gguf_file, llama_cpp
from ltepass.measure.quality import perplexity_of
from ltepass.measure.sides.side import Engine, Facts, Side

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
            held_bytes=self._path.stat().st_size,
            position_bytes=gguf_file.position_bytes(self._path),
            perplexity=perplexity_of(self._model.logits, blocks),
        )


def under_llama_cpp(dense: PreTrainedModel, formats: tuple[str, ...], scratch: Path, extra: Path | None) -> list[Side]:
    """Writes the dense model in each format; all is checked before."""
    for format in formats:
        gguf_file.check(dense.config, format)
    if extra is not None and (seen := gguf_file.vocabulary(extra)) != dense.config.vocab_size:
        raise ConfigError(f"{extra} knows {seen} tokens; expected the model's {dense.config.vocab_size}")
    sides: list[Side] = [LlamaCpp(path=_written(dense, scratch, format)) for format in formats]
    return sides if extra is None else [*sides, LlamaCpp(path=extra, name=f"llama.cpp, {extra.name}")]


def _written(dense: PreTrainedModel, scratch: Path, format: str) -> Path:
    path = scratch / f"{format}.gguf"
    if format != "Q4_K_M":
        gguf_file.write(dense, path, format)
        return path
    source = scratch / "source.gguf"
    gguf_file.write(dense, source, "F32")
    llama_cpp.requantise(source, path)
    source.unlink()
    return path
