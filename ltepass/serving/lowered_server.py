"""transformers' server loads models out of our sight: while one runs, what it loads is lowered, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.cli.serving.model_manager import ModelManager

from ltepass.routed.routed import state_of
from ltepass.transform_and_lower import lower


@contextmanager
def lowered_as_loaded() -> Iterator[None]:
    load = ModelManager._load_model

    def load_lowered(self: ModelManager, *args: object, **kwargs: object) -> nn.Module:
        model: nn.Module = load(self, *args, **kwargs)
        return model if state_of(model) is None else lower(model)

    ModelManager._load_model = load_lowered
    try:
        yield
    finally:
        ModelManager._load_model = load
