"""A causal LM of a GGUF file, as a plain model of transformers: its weights in floats, to be saved and changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltepass.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_gguf(name: str) -> bool:
    return name.endswith(".gguf") and Path(name).is_file()


def source(name: str) -> tuple[str, dict[str, str]]:
    """What transformers' `from_pretrained` takes: a folder or a name, and of a GGUF file what it is called there."""
    return (str(Path(name).parent), {"gguf_file": Path(name).name}) if is_gguf(name) else (name, {})


@contextmanager
def reading(name: str) -> Iterator[None]:
    """ConfigError for whatever transformers raises of a GGUF file: no classes are promised of one that is broken."""
    try:
        yield
    except Exception as error:
        if not is_gguf(name):
            raise
        if isinstance(error, ImportError):
            raise ConfigError(f"a GGUF file needs the package gguf ({error}); pip install gguf") from error
        raise ConfigError(
            f"{name} cannot be read as a GGUF model: {first_line(error)}; expected a whole file of a causal LM that "
            "transformers knows"
        ) from error


def load_gguf(file: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """In eval mode, on the CPU. fp32 holds what codes of 8 and fewer bits mean, exactly.

    Raises ConfigError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder, which = source(str(file))
    with reading(str(file)):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **which, dtype=dtype)
    # transformers refuses to save a model that came from GGUF: the same weights in a fresh model can be saved.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    with no_init_weights():
        model: PreTrainedModel = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model.to(dtype).eval()
