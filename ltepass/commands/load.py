"""A model by the name that a user gives on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ltepass.commands.hub import look_for_hub
from ltepass.errors import ConfigError, LTEError, first_line
from ltepass.gguf_models import is_gguf, load_gguf, reading, source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEITHER = "no model directory and no model of the hub that can be reached"


def call_by_name(name: str) -> tuple[nn.Module, object]:
    """`module:function` -> (model, example inputs or None); the function returns a model or such a pair."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be called ({error}); expected importable_module:function_name") from error
    finally:
        sys.path.pop(0)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name!r} returned {type(model).__name__}; expected an nn.Module, or (model, example_inputs)"
        )
    return model, inputs


def load(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model from a directory, a hub name, a GGUF file or `module:function`, in eval mode.

    dtype: None takes that of the file, fp32 of GGUF.
    """
    require_device(device)
    if ":" in name and not os.path.exists(name):
        return call_by_name(name)[0].to(device=device, dtype=dtype).eval()
    from transformers import AutoModelForCausalLM

    require_model(name)
    try:
        if is_gguf(name):
            return load_gguf(Path(name), dtype or torch.float32).to(device)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto").to(device).eval()
    except LTEError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is {NEITHER}: {first_line(error)}") from error


def require_model(name: str) -> None:
    """Raises ConfigError of a path where nothing is, and where `ltepass train` was stopped: no model is there yet."""
    from ltepass.commands.training_run import CHECKPOINTS

    folder = Path(name)
    if not folder.exists():
        path = folder.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf")
        if path or name.strip("/").count("/") > 1:
            raise ConfigError(f"{name!r} is no model directory, nor can it be a name of the hub: nothing is there")
        look_for_hub()
    if (folder / CHECKPOINTS).is_dir() and not (folder / "config.json").exists():
        raise ConfigError(f"{name} holds a training that has not ended; run the same `ltepass train` again: it goes on")


def require_config(name: str) -> None:
    """Raises ConfigError where no model of this name can be read."""
    from transformers import AutoConfig

    require_model(name)
    try:
        AutoConfig.from_pretrained(name)
    except LTEError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is {NEITHER}: {first_line(error)}") from error


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Of a model's directory or hub name. Raises ConfigError."""
    from transformers import AutoTokenizer

    require_model(name)
    try:
        folder, which = source(name)
        with reading(name):
            return AutoTokenizer.from_pretrained(folder, **which)
    except LTEError:
        raise
    except (OSError, ValueError) as error:
        if os.path.isdir(name):
            raise ConfigError(
                f"{name!r} has no tokenizer that can be read; expected one beside the model; save it there: "
                f"tokenizer.save_pretrained({name!r})"
            ) from error
        raise ConfigError(f"{name!r} is {NEITHER} ({first_line(error)}); expected one of them") from error


def require_device(name: str) -> None:
    """Raises ConfigError where this machine lacks it."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(f"--device is {name!r}; expected cpu, cuda, cuda:1, ...") from error
    there = torch.accelerator.current_accelerator(check_available=True)
    if kind not in ("cpu", "meta", there.type if there else "cpu"):
        raise ConfigError(f"--device is {name!r}, and torch finds no such device here; expected cpu")


def dtype_of(name: str | None) -> torch.dtype | None:
    """A dtype by the name that a user gives: of "bfloat16", torch.bfloat16. Raises ConfigError."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise ConfigError(f"dtype is {name!r}; expected one of {', '.join(known)}")
    return None if name is None else known[name]
