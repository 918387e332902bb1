"""capture: the model as ATen graphs.

    before:  an nn.Module, or a GraphModule in any dialect
    after:   graphs whose nodes carry the path of the module they came from; a refusal for each part that has none

Whole where it exports, else block by block; then the parts that the inputs never reach. A part is tried with the inputs
that it got in a run under fake tensors (which goes as far as it can), else with those of another module of its class,
else, when its forward takes one tensor, with hidden states of its first linear's width. A part that does not export is
left to its children: an FFN module is small, and exports where its surroundings do not.
Nothing here runs the model for real: export traces under fake tensors, which works on the meta device too, and the
training flag, RNG state, hooks, buffers and caches of the model are as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ltepass.errors import CaptureError
from ltepass.passes.capture.example_inputs import (
    Call,
    described,
    input_width,
    inputs_of,
    make_example_inputs,
    one_tensor,
    recorded_calls,
    split_inputs,
)
from ltepass.passes.capture.leave_untouched import bring_back, untouched
from ltepass.passes.capture.user_graph import capture_user_graph
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Flow
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.passes.graph.shared_names import aliases_of, join, sharers_of
from ltepass.routed.sites import Refusal


def export_module(
    root: nn.Module, part: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], prefix: str = ""
) -> Captured:
    """One ATen graph of `part`, which is `root.<prefix>`; leaves carry their first name in the root."""
    try:
        with untouched(root), torch.no_grad():
            bring_back(root)
            program = torch.export.export(part, tuple(args), dict(kwargs), strict=False)
    except MemoryError:
        raise  # other inputs would not help
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


# Raised where the code needs a value, which a fake tensor does not have: the inputs may be right.
ONLY_UNDER_FAKE_TENSORS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)


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


@dataclass
class Captures:
    """graphs: what was captured. missed: path of each part with linears that no graph shows -> why."""

    graphs: list[Captured] = field(default_factory=list)
    missed: dict[str, str] = field(default_factory=dict)


def count_matrices(module: nn.Module) -> int:
    """Matrices below a module: of linears, and bare parameters of a class that is no layer of torch."""
    bare = [m for m in module.modules() if not type(m).__module__.startswith("torch.nn") and input_width(m) is None]
    matrices = sum(p.dim() in (2, 3) for m in bare for p in m.parameters(recurse=False))
    return matrices + sum(input_width(m) is not None for m in module.modules())


class Parts:
    """Captures parts of `root`, going down where one cannot be captured."""

    def __init__(self, root: nn.Module, calls: Mapping[str, Call]) -> None:
        self.root, self.captures = root, Captures()
        self.calls = dict(calls)
        self.by_class = {type(root.get_submodule(path)): call for path, call in calls.items()}
        self.failed: dict[type[nn.Module], str] = {}  # one try for each class: its other instances fail alike
        self.done: set[int] = set()

    def add(self, path: str, module: nn.Module) -> None:
        if id(module) in self.done or count_matrices(module) < 2:
            return
        self.done.add(id(module))
        why = self._try(path, module)
        if why is None:
            return
        before = len(self.captures.graphs), len(self.captures.missed)
        for name, child in module.named_children():
            self.add(join(path, name), child)
        if before == (len(self.captures.graphs), len(self.captures.missed)):
            self.captures.missed[path] = why

    def _try(self, path: str, module: nn.Module) -> str | None:
        """Capture one module; why not, where it cannot be."""
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _holds_blocks(module):
            return "it holds blocks, which are tried one by one"
        if type(module) in self.failed:
            return self.failed[type(module)]
        call = self._call(path, module)
        if call is None:
            return "the example inputs do not reach it, and its own cannot be made up"
        try:
            self.captures.graphs.append(export_module(self.root, module, *call, prefix=path))
        except CaptureError as error:
            self.failed[type(module)] = str(error)
            return str(error)
        return None

    def _call(self, path: str, module: nn.Module) -> Call | None:
        if path in self.calls:
            return self.calls[path]
        if type(module) in self.by_class:
            return self.by_class[type(module)]
        if hasattr(module, "main_input_name"):
            try:
                return split_inputs(make_example_inputs(module))
            except CaptureError:
                return None
        return one_tensor(module)


def _holds_blocks(module: nn.Module) -> bool:
    """Such a module is captured block by block: the stack exports no better than the model did. A tower makes its own
    inputs.
    """
    if hasattr(module, "main_input_name") and module.main_input_name != "input_ids":
        return False
    return any(isinstance(m, nn.ModuleList) and len(m) > 1 and count_matrices(m[0]) > 1 for m in module.modules())
