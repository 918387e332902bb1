"""Example inputs in any form that a user gives. Those of a Hugging Face model are made from its config: zeros of the
right shape, for tracing under fake tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from ltepass.errors import CaptureError
from ltepass.passes.capture.leave_untouched import bring_back, untouched

TOKENS = 8  # length of the made-up prompt; long enough for token mixing to show


def make_example_inputs(model: nn.Module) -> dict[str, object]:
    """One example on the model's device: token ids, an image or audio features.

    Raises CaptureError where the model is no Hugging Face model, or wants an input that cannot be made up.
    """
    config = getattr(model, "config", None)
    if isinstance(model, GraphModule):
        return {}
    if config is None or not hasattr(config, "to_dict"):
        raise CaptureError(
            f"{type(model).__name__} is no Hugging Face model, so its inputs cannot be made up; expected "
            "example_inputs; pass a tuple, a dict or a tensor that model(...) accepts"
        )
    parameter = next(iter(model.parameters()), None)
    like = parameter if parameter is not None else torch.empty(())
    known = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, object] = {main: _main_input(model, config, main, like)}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
        inputs["decoder_input_ids"] = torch.zeros(1, TOKENS, dtype=torch.long, device=like.device)
    if "use_cache" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        inputs["use_cache"] = False
    return inputs


def _main_input(model: nn.Module, config: Any, name: str, like: Tensor) -> Tensor:
    if name == "input_ids":
        return torch.zeros(1, TOKENS, dtype=torch.long, device=like.device)
    if name == "pixel_values":
        size = getattr(config, "image_size", 32)
        side = (size, size) if isinstance(size, int) else tuple(size)
        return like.new_zeros(1, getattr(config, "num_channels", 3), *side)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        length = 2 * getattr(config, "max_source_positions", 50)  # the encoders halve it
        return like.new_zeros(1, config.num_mel_bins, length)
    raise CaptureError(f"{type(model).__name__} wants {name!r}, which cannot be made up; pass example_inputs")


Call = tuple[tuple[object, ...], dict[str, object]]  # what a module is called with


def inputs_of(model: nn.Module, example_inputs: object) -> Call:
    """(args, kwargs) of a tuple (args), a dict (kwargs), one tensor, or None: a Hugging Face model makes its own."""
    return split_inputs(make_example_inputs(model) if example_inputs is None else example_inputs)


def split_inputs(example: object) -> Call:
    """(args, kwargs) of example inputs in any accepted form."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise CaptureError(f"example_inputs is a {type(example).__name__}; expected a tuple, a dict or a tensor")


def described(args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """For a message: shapes and dtypes of the inputs that a model was called with."""

    def one(v: object) -> str:
        return f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else repr(v)

    parts = [one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]
    return "inputs (" + ", ".join(parts) + ")"


def input_width(module: nn.Module) -> int | None:
    """The width of what a linear module takes, for inputs that are made up; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        return module.weight.shape[0]
    return None


def one_tensor(module: nn.Module) -> Call | None:
    """Hidden states for a module whose forward takes one tensor and nothing else that has no default."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    width = next((w for m in module.modules() if (w := input_width(m)) is not None), None)
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if len(needed) != 1 or width is None or like is None:
        return None
    return (like.new_zeros(1, TOKENS, width),), {}


def without_fakes(call: Call) -> Call:
    """Inputs to trace with out of a call that was seen under fake tensors: these become zeros, and objects (caches,
    outputs) nothing.
    """

    def one(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return torch.zeros(tuple(leaf.shape), dtype=leaf.dtype, device=leaf.device)
        return leaf if isinstance(leaf, (int, float, bool, str, type(None))) else None

    plain: Call = torch.utils._pytree.tree_map(one, call)
    return plain


def recorded_calls(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[dict[str, Call], Exception | None]:
    """What each module was called with in a run under fake tensors, which compute nothing, and how the run failed."""
    calls: dict[str, Call] = {}
    handles = []
    failure = None

    def recorder(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            calls.setdefault(path, (args, kwargs))

        return record

    with untouched(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        bring_back(model)
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(recorder(path), with_kwargs=True))
        try:
            fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (tuple(args), dict(kwargs)))
            model(*fake[0], **fake[1])
        except MemoryError:
            raise
        except Exception as e:  # what was called before is known
            failure = e
        finally:
            for handle in handles:
                handle.remove()
    return {path: without_fakes(call) for path, call in calls.items()}, failure
