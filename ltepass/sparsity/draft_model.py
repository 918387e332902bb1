"""A draft for assisted generation: the model again, at another sparsity, holding its tensors and not copies of them."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

from ltepass.config import check_sparsity
from ltepass.routed.routed import Routed
from ltepass.sparsity.thresholds import place_thresholds

Model = TypeVar("Model", bound=nn.Module)


def draft(model: Model, sparsity: float) -> Model:
    """A second model of the same weights at another sparsity, for `model.generate(..., assistant_model=draft)`.

    It proposes tokens, which the model checks several at a time: greedily, the text is the model's own. Each checked
    token chooses neurons of its own, so that a check reads their union: what the draft saves has to be worth that. With
    inactive="low_bit" neurons that are not active keep their 4-bit half: a sparsity near 1 makes a draft of fewer bits.

    Arguments:
        model: a calibrated model, in hard mode to be of use, lowered (scope "ffn") or not.
        sparsity: the draft's share of inactive experts, in [0, 1).
    Returns: the draft. Only thresholds and cuts are its own: what changes the model's weights or tables changes the
        draft's. It is lowered as the model is, but for scope "model": lower it then. int8 and int4 codes that `lower`
        made are copied.
    Raises: ConfigError outside [0, 1), CalibrationError without a calibrated table, NotTransformedError.
    Example:
        >>> ltepass.set_mode(model, "hard")
        >>> quick = ltepass.draft(model, 0.8)
        >>> out = model.generate(ids[:1], max_new_tokens=8, do_sample=False, assistant_model=quick)
        >>> torch.equal(out, model.generate(ids[:1], max_new_tokens=8, do_sample=False))
        True
    """
    check_sparsity(sparsity, "sparsity")
    routed = Routed.of(model, "draft")
    own = {id(buffer) for router in routed.routers for buffer in router.buffers() if not buffer.dim()}
    tensors = chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if id(tensor) not in own})
    place_thresholds(Routed.of(twin, "draft"), sparsity)
    return twin
