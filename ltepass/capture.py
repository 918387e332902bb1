"""Capture a model as one graph whose nodes know their module: torch.export for modules, shape propagation for graphs.

Nothing here runs the user's model for real: export traces under fake tensors, which works on the meta device too.
The training flag, RNG state, hooks and caches of the model are as before.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ltepass.dataflow import Flow
from ltepass.errors import CaptureError

TOKENS = 8  # length of the made-up prompt; long enough for token mixing to show


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph of (a part of) `root`. prefix: path of the captured part in the root, "" for all of it."""

    flow: Flow
    prefix: str = ""

    def stack(self, node: Node) -> list[str]:
        """Paths of the module calls that a node stands in, outermost first; [""] is the root."""
        raw = node.meta.get("nn_module_stack") or {}
        paths = [re.sub(r"@\d+", "", str(path)) for path, _ in raw.values()]
        joined = [".".join(p for p in (self.prefix, path) if p) for path in paths]
        return list(dict.fromkeys([self.prefix, *joined]))


def capture(model: nn.Module, example_inputs: Any = None) -> Captured:
    """One ATen graph of the model.

    example_inputs: a tuple (args), a dict (kwargs), one tensor, or None for a Hugging Face model, which makes its own.
    Raises CaptureError with the tracer's own words where the model or the inputs cannot be traced.
    """
    args, kwargs = _split(example_inputs if example_inputs is not None else make_example_inputs(model))
    if isinstance(model, GraphModule):
        return _capture_graph_module(model, args, kwargs)
    return export_module(model, args, kwargs)


def export_module(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], prefix: str = "") -> Captured:
    try:
        with _untouched(model), torch.no_grad():
            program = torch.export.export(model, tuple(args), dict(kwargs), strict=False)
    except Exception as e:
        said = str(e).strip().splitlines()
        raise CaptureError(
            f"torch.export could not trace {type(model).__name__} with {_describe(args, kwargs)}: "
            f"{type(e).__name__}: {said[0] if said else ''}; pass example_inputs that model(...) accepts"
        ) from e
    names = program.graph_signature
    by_target = {**names.inputs_to_parameters, **names.inputs_to_buffers}
    constants = names.inputs_to_lifted_tensor_constants
    leaves = {
        n: by_target.get(n.name, constants.get(n.name, n.name))
        for n in program.graph.nodes
        if n.op == "placeholder" and (n.name in by_target or n.name in constants)
    }
    leaves = {n: ".".join(p for p in (prefix, name) if p) for n, name in leaves.items()}
    return Captured(flow=Flow(program.graph_module, leaves), prefix=prefix)


def _capture_graph_module(gm: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Captured:
    """Shapes for a user's graph, on a copy whose plain leaf modules are inlined."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    from ltepass.passes.normalize import inline_leaf_modules

    flat = inline_leaf_modules(gm)
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        placeholders = [n for n in flat.graph.nodes if n.op == "placeholder"]
        values = _bind(placeholders, args, kwargs)
        with torch.no_grad():
            FakeTensorProp(flat, mode).propagate(*values)
    except Exception as e:
        raise CaptureError(
            f"the GraphModule could not be run on fake tensors with {_describe(args, kwargs)}: "
            f"{type(e).__name__}: {e}; pass example_inputs for its {len(placeholders)} placeholders"
        ) from e
    leaves = {n: str(n.target) for n in flat.graph.nodes if n.op == "get_attr" and isinstance(n.meta.get("val"), Tensor)}
    return Captured(flow=Flow(flat, leaves))


def _bind(placeholders: Sequence[Node], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Values in placeholder order: positional, then by name, then the value that the graph itself was traced with."""
    out: list[Any] = list(args)
    for node in placeholders[len(out) :]:
        if str(node.target) in kwargs:
            out.append(kwargs[str(node.target)])
        elif node.args:
            out.append(node.args[0])
        else:
            val = node.meta.get("val", node.meta.get("example_value"))
            if val is None:
                raise ValueError(f"no value for placeholder {node.target}")
            out.append(torch.empty(tuple(int(s) for s in val.shape), dtype=val.dtype))
    return out


def make_example_inputs(model: nn.Module) -> dict[str, Any]:
    """A prompt of token ids for a Hugging Face text model, on the model's device."""
    config = getattr(model, "config", None)
    if isinstance(model, GraphModule):
        return {}
    if config is None or not hasattr(config, "to_dict"):
        raise CaptureError(
            f"{type(model).__name__} is no Hugging Face model, so its inputs cannot be made up; expected "
            "example_inputs; pass a tuple, a dict or a tensor that model(...) accepts"
        )
    parameter = next(iter(model.parameters()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    known = inspect.signature(model.forward).parameters
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    inputs: dict[str, Any] = {}
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        inputs["input_ids"] = ids
    elif model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 32)
        side = (size, size) if isinstance(size, int) else tuple(size)
        inputs["pixel_values"] = torch.zeros(1, getattr(config, "num_channels", 3), *side, device=device)
    else:
        raise CaptureError(
            f"{type(model).__name__} wants {model.main_input_name!r}, which cannot be made up; pass example_inputs"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        inputs["use_cache"] = False
    return inputs


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise CaptureError(f"example_inputs is a {type(example).__name__}; expected a tuple, a dict or a tensor")


def _describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    def one(v: Any) -> str:
        return f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else repr(v)

    parts = [one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]
    return "inputs (" + ", ".join(parts) + ")"


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """RNG state and buffers' identity as before; export's own chatter kept low."""
    rng = torch.get_rng_state()
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.set_rng_state(rng)
