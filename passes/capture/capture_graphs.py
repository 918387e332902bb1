"""capture: the model as ATen graphs.

    before:  an nn.Module, or a GraphModule in any dialect
    after:   graphs whose nodes carry the path of the module they came from; a refusal for each part that has none

Whole where it exports, else block by block; then the parts that the inputs never reach.
Nothing of the model changes: export runs under fake tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from ltepass.errors import CaptureError
from ltepass.passes.capture.example_inputs import inputs_of
from ltepass.passes.capture.export_module import export_module
from ltepass.passes.capture.partial_capture import (
    ONLY_UNDER_FAKE_TENSORS,
    Captures,
    Parts,
    count_matrices,
    recorded_calls,
)
from ltepass.passes.capture.user_graph import capture_user_graph
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.passes.graph.shared_names import join
from ltepass.routed.sites import Refusal


@dataclass(frozen=True, kw_only=True)
class CaptureGraphs:
    name: str = "capture"
    tier: Tier = "exact"
    skippable: bool = False

    def __call__(self, job: TransformJob) -> str:
        captures = capture_all(job.model, job.example_inputs)
        job.captured = captures.graphs
        job.refusals += [
            Refusal(module=path, node="", check="capture", reason=f"its linears are in no graph: {why}")
            for path, why in captures.missed.items()
        ]
        nodes = sum(len(c.flow.gm.graph.nodes) for c in job.captured)
        return f"{len(job.captured)} graph(s), {nodes} nodes"


def capture_all(model: nn.Module, example_inputs: object = None) -> Captures:
    """Every part of the model that can be traced.

    Raises CaptureError where nothing can, where the model takes inputs that cannot be made up, and where it does not
    take the ones that were given.
    """
    args, kwargs = inputs_of(model, example_inputs)
    if isinstance(model, GraphModule):
        return Captures([capture_user_graph(model, args, kwargs)])
    try:
        whole = export_module(model, model, args, kwargs)
    except CaptureError as error:
        calls, failure = recorded_calls(model, args, kwargs)
        if example_inputs is not None and failure is not None and not isinstance(failure, ONLY_UNDER_FAKE_TENSORS):
            raise
        found = Parts(model, calls)
        for name, child in model.named_children():
            found.add(name, child)
        if not found.captures.graphs:
            raise
        found.captures.missed = {p: f"{why} (the whole model: {error})" for p, why in found.captures.missed.items()}
        return found.captures
    found = Parts(model, {})
    found.captures.graphs.append(whole)
    reached = {part for node in whole.flow.nodes() for path in whole.stack(node) for part in _with_parents(path)}
    for path in _unreached(model, reached):
        found.add(path, model.get_submodule(path))
    return found.captures


def _with_parents(path: str) -> list[str]:
    """The path and what holds it: a module whose methods are called, not its forward, stands in no stack itself."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _unreached(model: nn.Module, reached: set[str], path: str = "") -> Iterator[str]:
    """The topmost modules that no operation of the graph stands in, and that hold at least two linears."""
    for name, child in model.named_children():
        here = join(path, name)
        if here in reached or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _unreached(child, reached, here)
        elif count_matrices(child) > 1:
            yield here
