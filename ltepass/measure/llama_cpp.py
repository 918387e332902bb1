"""llama.cpp, through llama-cpp-python's plain C functions: one model file that is fed given tokens.

Its defaults stand: the file is memory-mapped (matrices that it repacks are copied), keys and values are kept in f16.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ltepass.errors import ConfigError

if TYPE_CHECKING:
    from llama_cpp import llama_batch

BATCH = 512  # tokens of one call, at most


def library() -> ModuleType:
    """The module, which prints nothing; ConfigError where it is not installed. Loading it starts no thread."""
    try:
        c: ModuleType = importlib.import_module("llama_cpp").llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"llama.cpp cannot be loaded ({error}); expected llama-cpp-python; pip install 'ltepass[compare]', which "
            "compiles it for this machine in 10 to 20 minutes"
        ) from error
    c.llama_log_set(_silent(c), ctypes.c_void_p())
    return c


@cache
def _silent(c: ModuleType) -> object:
    """Kept for good: C holds the pointer."""
    return c.llama_log_callback(lambda *_: None)


def system_info() -> str:
    """What llama.cpp was compiled for, in its own words, and the version of the binding."""
    info: str = library().llama_print_system_info().decode()
    return f"llama-cpp-python {importlib.import_module('llama_cpp').__version__}; {info.strip(' |')}"


class LlamaCpp:
    """One loaded file with one context of `length` tokens on `threads` threads.

    cache: type of keys and values; f32 is for comparing logits, at which flash attention, which rounds to f16, is off.
    """

    def __init__(self, path: Path, *, threads: int, length: int, cache: Literal["f16", "f32"] = "f16") -> None:
        self._c = library()
        self._c.llama_backend_init()
        self._model = self._c.llama_model_load_from_file(str(path).encode(), self._c.llama_model_default_params())
        if not self._model:
            raise ConfigError(f"llama.cpp cannot load {path}; expected a GGUF file of a model that it knows")
        options = self._c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = length, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        if cache == "f32":
            options.type_k = options.type_v = self._c.GGML_TYPE_F32
            options.flash_attn_type = self._c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._c.llama_init_from_model(self._model, options)
        self.vocabulary = int(self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model)))

    def forget(self) -> None:
        """Empties the cache of keys and values."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)

    def read(self, tokens: list[int]) -> None:
        """Goes on with these tokens; the last one's logits are there then."""
        for first in range(0, len(tokens), BATCH):  # of more at once it aborts
            some = tokens[first : first + BATCH]
            array = (self._c.llama_token * len(some))(*some)
            self._decode(self._c.llama_batch_get_one(array, len(some)))

    def next_token(self) -> int:
        """The likeliest one after what was read."""
        return int(self._logits(1)[0].argmax())

    def logits(self, tokens: Tensor) -> Tensor:
        """[T, vocabulary] in fp32, of a text [T] alone, T at most BATCH."""
        self.forget()
        batch = self._c.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        self._decode(batch)
        self._c.llama_batch_free(batch)
        return self._logits(len(tokens)).clone()

    def _decode(self, batch: llama_batch) -> None:
        if status := self._c.llama_decode(self._context, batch):
            raise ConfigError(f"llama.cpp returned {status} for {batch.n_tokens} tokens; expected 0")

    def _logits(self, rows: int) -> Tensor:
        """A view of the logits of llama.cpp's last call, which the next call overwrites."""
        pointer = self._c.llama_get_logits(self._context)
        array = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (rows * self.vocabulary))).contents
        return torch.frombuffer(array, dtype=torch.float32).view(rows, self.vocabulary)

    def close(self) -> None:
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)


def requantise(source: Path, target: Path) -> None:
    """Q4_K_M of an F32 file, by llama.cpp's own recipe, which gives some layers more bits."""
    c = library()
    options = c.llama_model_quantize_default_params()
    options.ftype = c.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if c.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise ConfigError(f"llama.cpp could not write {target} in Q4_K_M from {source}")
