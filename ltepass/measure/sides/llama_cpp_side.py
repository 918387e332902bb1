"""The same weights under llama.cpp, the program that one would pick instead."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ltepass.errors import ConfigError
from ltepass.measure import gguf_file, llama_cpp
from ltepass.measure.quality import perplexity_of
from ltepass.measure.sides.side import Engine, Facts


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
