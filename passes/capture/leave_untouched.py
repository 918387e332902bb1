"""A trace of a user's model leaves it, and the process, as they were."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from ltepass.routed.undo import refill
from ltepass.threads import quiet_stderr, tracing


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Random numbers, every module's attributes and the containers in them as before; export's own chatter kept quiet.

    One thread at a time: what is put back here must be what this thread found.
    """
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._subclasses.fake_tensor")]
    with tracing(), _same_random_numbers(), _same_attributes(model), _unpatched_modules():
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)  # a failed trace is an error of ours, with the tracer's words in it
        try:
            with quiet_stderr():  # where export prints the whole graph of a failure
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Python's own. Torch's stay by themselves: nothing is drawn for a fake tensor."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


@contextlib.contextmanager
def _unpatched_modules() -> Iterator[None]:
    """A Ctrl-C while torch.fx takes back what it set on nn.Module would leave it there, for every model.

    So would its list of what it set, which the next trace in the process sets once more.
    """
    before, patcher = (nn.Module.__call__, nn.Module.__getattr__), _symbolic_trace.CURRENT_PATCHER
    try:
        yield
    except BaseException:
        nn.Module.__call__, nn.Module.__getattr__ = before  # type: ignore[method-assign]
        _symbolic_trace.CURRENT_PATCHER = patcher
        raise


@contextlib.contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    """Of every module: those that a trace sets or takes away, and the containers in them, are as before."""
    attributes = [(m.__dict__, dict(m.__dict__)) for m in model.modules()]
    held = [(v, copy.copy(v)) for _, was in attributes for v in was.values() if isinstance(v, (dict, list, set))]
    try:
        yield
    finally:
        for now, before in (*attributes, *held):
            refill(now, before)


def bring_back(model: nn.Module) -> None:
    """Take accelerate's hooks away, and stand-ins for the weights that they fetch: they move tensors, and a trace
    computes nothing. Inside `untouched`, which puts all of it back.
    """
    for module in model.modules():
        if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
            module.__dict__["forward"] = module.__dict__["_old_forward"]
            for held in (module._parameters, module._buffers):
                held.update({k: _stand_in(t) for k, t in held.items() if t is not None and t.is_meta})


def _stand_in(tensor: Tensor) -> nn.Parameter:
    """What a trace reads for a weight that is fetched later: its shape and dtype, in the memory of one number."""
    one = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(one, requires_grad=False) if isinstance(tensor, nn.Parameter) else one  # type: ignore[return-value]
