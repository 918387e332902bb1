"""Capture one module as one graph whose nodes know their module: torch.export, under fake tensors.

Nothing here runs the user's model for real: export traces under fake tensors, which works on the meta device too.
The training flag, RNG state, hooks, buffers and caches of the model are as before.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, _symbolic_trace

from ltepass.errors import CaptureError
from ltepass.passes.capture.example_inputs import described
from ltepass.passes.capture.replaced_forwards import bring_back
from ltepass.passes.capture.user_graph import capture_user_graph
from ltepass.passes.graph.captured import Captured, join
from ltepass.passes.graph.leaves_and_linears import Flow
from ltepass.routed.undo import refill
from ltepass.threads import quiet_stderr, tracing


def capture(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Captured:
    """One ATen graph of the model. Raises CaptureError with the tracer's own words where it cannot be traced."""
    if isinstance(model, GraphModule):
        return capture_user_graph(model, args, kwargs)
    return export_module(model, model, args, kwargs)


def export_module(
    root: nn.Module, part: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], prefix: str = ""
) -> Captured:
    """One ATen graph of `part`, which is `root.<prefix>`; leaves carry their first name in the root."""
    try:
        with untouched(root), torch.no_grad():
            bring_back(root)
            program = torch.export.export(part, tuple(args), dict(kwargs), strict=False)
    except Exception as e:
        said = str(e).strip().splitlines()
        raise CaptureError(
            f"torch.export could not trace {type(part).__name__} with {described(args, kwargs)}: "
            f"{type(e).__name__}: {said[0] if said else ''}; pass example_inputs that model(...) accepts"
        ) from e
    names = program.graph_signature
    by_target = {**names.inputs_to_parameters, **names.inputs_to_buffers}
    literals = names.inputs_to_lifted_tensor_constants
    leaves = {n: by_target[n.name] for n in program.graph.nodes if n.op == "placeholder" and n.name in by_target}
    first = {id(t): name for name, t in (*root.named_buffers(), *root.named_parameters())}
    leaves = {n: first.get(id(_tensor(part, name)), join(prefix, name)) for n, name in leaves.items()}
    constants = {literals[n.name]: n for n in program.graph.nodes if n.name in literals}
    values = {k: program.constants[k] for k in constants if isinstance(program.constants.get(k), Tensor)}
    flow = Flow(program.graph_module, {**leaves, **{constants[k]: k for k in constants}}, values)
    return Captured(flow=flow, prefix=prefix, aliases=_aliases(root), sharers=_sharers(root))


def _tensor(part: nn.Module, name: str) -> object:
    path, _, attribute = name.rpartition(".")
    return getattr(part.get_submodule(path), attribute)


def _aliases(root: nn.Module) -> dict[str, str]:
    first = {id(m): path for path, m in root.named_modules()}
    return {path: first[id(m)] for path, m in root.named_modules(remove_duplicate=False) if first[id(m)] != path}


def _sharers(root: nn.Module) -> dict[str, list[str]]:
    first: dict[int, str] = {}
    holders: dict[str, list[str]] = {}
    for path, module in root.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(first.setdefault(id(parameter), join(path, name)), []).append(path)
    return {name: paths for name, paths in holders.items() if len(paths) > 1}


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
    attributes = [(m.__dict__, dict(m.__dict__)) for m in model.modules()]
    held = [(v, copy.copy(v)) for _, was in attributes for v in was.values() if isinstance(v, (dict, list, set))]
    try:
        yield
    finally:
        for now, before in (*attributes, *held):
            refill(now, before)
