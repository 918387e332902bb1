"""The same weights under onnxruntime-genai, a second program that one might pick, at what its own builder makes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ConfigError
from ltepass.measure.quality import perplexity_of
from ltepass.measure.sides.side import Engine, Facts, Side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRECISIONS = {"F32": "fp32", "Q8_0": "int8", "Q4_0": "int4"}  # what it calls as many bits
# Of what these take from a table (embeddings, the sines of positions), a token reads a row.
GATHERS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding")


def library() -> ModuleType:
    """ConfigError where it, or what its builder needs, is not installed."""
    try:
        importlib.import_module("onnx_ir")
        return importlib.import_module("onnxruntime_genai")
    except (ImportError, OSError) as error:
        raise ConfigError(f"onnxruntime-genai cannot be loaded ({error}); pip install 'ltepass[compare]'") from error


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """A folder of its builder, one token at a time, its logits read and their largest found."""

    folder: Path
    format: str
    name: str = "onnxruntime"

    def imports(self) -> None:
        library()

    def open(self, length: int) -> Engine:
        return _OnnxRuntimeEngine(self.folder, self.format, length)


class _OnnxRuntimeEngine:
    def __init__(self, folder: Path, format: str, length: int) -> None:
        self._og, self._folder, self._format = library(), folder, format
        config = self._og.Config(str(folder))
        threads = {"session_options": {"intra_op_num_threads": torch.get_num_threads()}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        model = self._og.Model(config)
        params = self._og.GeneratorParams(model)
        params.set_search_options(max_length=length, do_sample=False)
        self._generator = self._og.Generator(model, params)

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        self._generator.rewind_to(0)
        stamps = [time.perf_counter()]
        for step in (prompt, *tokens[:-1, None]):
            self._generator.append_tokens(step.int().numpy())
            self._generator.get_logits().argmax()
            stamps.append(time.perf_counter())
        return [b - a for a, b in pairwise(stamps)]

    def read_pass(self) -> tuple[int, float]:
        raise ConfigError("the weights inside onnxruntime cannot be read from outside; add a side of ours")

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        read, held = weight_bytes(self._folder)
        shape = json.loads((self._folder / "genai_config.json").read_text())["model"]["decoder"]
        return Facts(
            how=f"onnxruntime-genai {self._og.__version__}",
            format=self._format,
            head=self._format,
            weight_bytes=read,
            held_bytes=held,
            position_bytes=8 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_size"],
            perplexity=perplexity_of(self._logits, blocks),
        )

    def _logits(self, block: Tensor) -> Tensor:
        """[T] -> [T, vocabulary]."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(block.int().numpy())
        return torch.from_numpy(self._generator.get_output("logits"))[0]


def weight_bytes(folder: Path) -> tuple[int, int]:
    """Of a builder's folder: (what a token reads, what is held)."""
    onnx_ir = importlib.import_module("onnx_ir")
    graph = onnx_ir.load(folder / "model.onnx").graph
    read = held = 0
    for value in graph.initializers.values():
        size, rows = value.const_value.nbytes, max(value.shape[0] if len(value.shape) else 1, 1)
        kinds = Counter(use.node.op_type for use in value.uses())
        held += size
        read += size // rows if all(kind in GATHERS for kind in kinds) else size
    return read, held


def under_onnxruntime(dense: PreTrainedModel, formats: Iterable[str], tokenizer: str, scratch: Path) -> list[Side]:
    """Builds the dense model in each format that its builder makes for a CPU. tokenizer: the builder wants one."""
    known = [format for format in formats if format in PRECISIONS]
    if not known:
        raise ConfigError(f"onnxruntime is measured in {', '.join(PRECISIONS)}; --formats has none of them")
    from transformers import AutoTokenizer

    source = scratch / "dense"
    dense.save_pretrained(source)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(source)
    return [OnnxRuntime(folder=_built(source, scratch, format), format=format) for format in known]


def _built(source: Path, scratch: Path, format: str) -> Path:
    out = scratch / f"onnx-{format}"
    words = ["-i", source, "-o", out, "-p", PRECISIONS[format], "-e", "cpu", "-c", scratch / "cache"]
    call = [sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, words)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"onnxruntime-genai cannot build this model in {format}: {done.stderr.strip()[-300:]}")
    return out
