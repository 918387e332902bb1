"""transformers' server loads models out of our sight: while one runs, what it loads is lowered, and nothing else is.

The log says what was lowered: the server's own says nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.cli.serving.model_manager import ModelManager

from ltepass.errors import one_line
from ltepass.routed.routed import state_of
from ltepass.routed.torchao_weights import is_quantised
from ltepass.transform_and_lower import lower

log = logging.getLogger("ltepass")


@contextmanager
def lowered_as_loaded() -> Iterator[None]:
    load = ModelManager._load_model

    def load_lowered(self: ModelManager, *args: object, **kwargs: object) -> PreTrainedModel:
        model: PreTrainedModel = load(self, *args, **kwargs)
        state = state_of(model)
        if state is None and is_quantised(model):
            log.info("%s is dense: lowered its linears", one_line(model.config.name_or_path))
            return lower(model, ffn=False)
        if state is None:
            log.info("%s is dense, and served as it is", one_line(model.config.name_or_path))
            return model
        lower(model)
        log.info("%s: lowered %d FFNs", one_line(model.config.name_or_path), len(state.sites))
        return model

    ModelManager._load_model = load_lowered
    handler, level = logging.StreamHandler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        ModelManager._load_model = load
        log.removeHandler(handler)
        log.setLevel(level)
