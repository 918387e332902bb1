"""`ltepass inspect`: what transform would find in a model, without its weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

import ltepass
from ltepass.commands.load import NEITHER, call_by_name, load, require_model
from ltepass.config import LTEConfig
from ltepass.errors import ConfigError, LTEError, first_line
from ltepass.gguf_models import reading, source
from ltepass.routed.report_tables import Report
from ltepass.routed.routed import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def inspect_model(name: str, group_size: int | None = None, match: str = "ffn") -> Report | str:
    """The report of a transform under identity grouping. A config is enough: weights are neither read nor made.

    Raises NoFFNFoundError with the refusals where nothing is found.
    """
    inputs = None
    if ":" in name and not os.path.exists(name):
        model, inputs = call_by_name(name)
    else:
        model = _skeleton(name)
    if state_of(model) is None:
        config = LTEConfig(group_size=group_size or "auto", grouping="identity")
        ltepass.transform(model, example_inputs=inputs, config=config, match=match)  # type: ignore[arg-type]  # it checks
    return ltepass.report(model)


def _skeleton(name: str) -> PreTrainedModel:
    """The model of a directory or hub name, on the meta device; a saved LTE model is described as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    require_model(name)
    try:
        folder, which = source(name)
        with reading(name):
            config = AutoConfig.from_pretrained(folder, **which)
    except LTEError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} is {NEITHER}: {first_line(error)}") from error
    entry = getattr(config, "quantization_config", None) or {}
    if entry.get("quant_method") == "lte" or "lte" in entry:  # alone, or beside torchao's
        return load(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()
