"""Capture one module as one graph whose nodes know their module: torch.export, under fake tensors.

Nothing here runs the user's model for real: export traces under fake tensors, which works on the meta device too.
The training flag, RNG state, hooks, buffers and caches of the model are as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ltepass.errors import CaptureError
from ltepass.passes.capture.example_inputs import described
from ltepass.passes.capture.leave_untouched import bring_back, untouched
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Flow
from ltepass.passes.graph.shared_names import aliases_of, join, sharers_of


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
    return Captured(flow=flow, prefix=prefix, aliases=aliases_of(root), sharers=sharers_of(root))


def _tensor(part: nn.Module, name: str) -> object:
    path, _, attribute = name.rpartition(".")
    return getattr(part.get_submodule(path), attribute)
