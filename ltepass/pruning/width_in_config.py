"""The one width of FFNs that a config of transformers holds."""

from __future__ import annotations

import copy

import torch
from torch import nn

# By which names configs say it; of one that says it otherwise, a model loads where ltepass is installed.
NAMES = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim", "ffn_hidden_size", "inner_dim")
PAIRS = (("encoder_ffn_dim", "decoder_ffn_dim"),)


def say_width(model: nn.Module, width: int) -> bool:
    """Write it into the model's config, where a model that is built from this has the shapes of this one."""
    config = getattr(model, "config", None)
    for names in (*((name,) for name in NAMES), *PAIRS):
        if not all(hasattr(config, name) for name in names):
            continue
        trial = copy.deepcopy(config)
        for name in names:
            setattr(trial, name, width)
        if _builds(model, trial):
            for name in names:
                setattr(config, name, width)
            return True
    return False


def _builds(model: nn.Module, config: object) -> bool:
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except Exception:  # whatever a class says of a size that it cannot have: this entry is not the one
        return False
    here = dict(model.named_parameters())
    return all(name in here and here[name].shape == made.shape for name, made in built.named_parameters())
