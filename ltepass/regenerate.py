"""Regenerated forwards: give one module instance a subclass whose `forward` is an FX graph's code.

`isinstance`, the class's name and every child's name stay. Instances whose code is equal share one class, so that
Dynamo compiles it once. Pickle stores the original class, the source and the functions it calls, and rebuilds.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import keyword
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from torch.fx import Graph, Tracer

from ltepass.errors import SourceNameError
from ltepass.names import is_path, shown
from ltepass.router import Router


@dataclass(frozen=True)
class _ModuleRef:
    """A Python module by name: pickle takes no modules."""

    name: str


@dataclass(frozen=True)
class ForwardCode:
    """Source of one `forward`, and the objects that it names (a tuple of pairs, so that it hashes)."""

    source: str
    names: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(graph: Graph) -> ForwardCode:
        _check_names(graph)
        code = graph.python_code("self")
        used = {k: v for k, v in code.globals.items() if re.search(rf"\b{re.escape(k)}\b", code.src)}
        refs = {k: _ModuleRef(v.__name__) if isinstance(v, ModuleType) else v for k, v in used.items()}
        return ForwardCode(code.src, tuple(sorted(refs.items())))

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardCode:
        return self


def _check_names(graph: Graph) -> None:
    """FX writes targets and names into the source as they are, and `_compile` runs it."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and not is_path(node.target):
            raise _unfit(node.target)
        words = [node.name, *node.kwargs]
        words += [node.target.lstrip("*")] if node.op in ("placeholder", "call_method") else []
        for word in words:
            if not word.isidentifier() or keyword.iskeyword(word):
                raise _unfit(word)


def _unfit(name: str) -> SourceNameError:
    return SourceNameError(
        f"{shown(name)} would be written into the source of a forward; expected dotted names of letters, digits and "
        "underscores; rename the module or parameter"
    )


@dataclass(frozen=True)
class Forwards:
    """Code for training and evaluation; one object twice where they agree."""

    train: ForwardCode
    evaluate: ForwardCode


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before its forward was regenerated."""
    return getattr(type(module), "_lte_original", type(module))


def regenerate(module: nn.Module, forwards: Forwards) -> None:
    """Swap the module's class for one with these forwards."""
    module.__class__ = regenerated_class(original_class(module), forwards)  # type: ignore[arg-type]


@functools.cache
def regenerated_class(original: type[nn.Module], forwards: Forwards) -> type[nn.Module]:
    train = _compile(forwards.train, original)
    evaluate = train if forwards.train == forwards.evaluate else _compile(forwards.evaluate, original)

    if train is evaluate:
        forward = train
    else:

        @functools.wraps(original.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (train if self.training else evaluate)(self, *args, **kwargs)

    return subclass(original, {"forward": forward, "_lte_forwards": forwards}, _rebuild, (original, forwards))


def subclass(
    original: type[nn.Module], body: dict[str, Any], rebuild: Callable[..., nn.Module], arguments: tuple[Any, ...]
) -> type[nn.Module]:
    """A subclass that passes for the original. Pickle cannot import it by name, so it calls rebuild(*arguments)."""

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        return rebuild, arguments, self.__dict__

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(
        original.__name__, (original,), {**body, **names, "__reduce_ex__": reduce_ex, "_lte_original": original}
    )


def _rebuild(original: type[nn.Module], forwards: Forwards) -> nn.Module:
    cls = regenerated_class(original, forwards)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _compile(code: ForwardCode, original: type[nn.Module]) -> Any:
    scope = {k: importlib.import_module(v.name) if isinstance(v, _ModuleRef) else v for k, v in code.names}
    exec(compile(code.source, f"<ltepass forward of {original.__qualname__}>", "exec"), scope)
    return scope["forward"]


class _OwnerTracer(Tracer):
    """Children are leaves, so that whatever wraps a child later (LoRA, offload, quantised linears) is simply called."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traceable(owner: nn.Module) -> bool:
    """Only a forward that takes tensors and nothing optional is read right by symbolic tracing."""
    parameters = list(inspect.signature(type(owner).forward).parameters.values())[1:]
    return bool(parameters) and all(
        p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name != "kwargs" for p in parameters
    )


def trace_owner(owner: nn.Module, *, defaults: bool = False) -> tuple[Graph, Graph] | None:
    """(training graph, evaluation graph) of the owner's own forward, or None where it cannot be traced.

    Routers are hidden meanwhile: a Sequential would call every child that it holds. defaults: also a forward with
    options, at their defaults: to look at, not to run in its place.
    """
    if not (defaults or traceable(owner)) or type(owner).forward is nn.Module.forward:
        return None
    options = inspect.signature(type(owner).forward).parameters.values() if defaults else ()
    fixed = {p.name: p.default for p in options if p.default is not p.empty}
    before, state = owner.training, dict(owner.__dict__)
    graphs = []
    try:
        owner.__dict__["_modules"] = {k: m for k, m in owner._modules.items() if not isinstance(m, Router)}
        for flag in (True, False):
            owner.training = flag  # the flag alone: children keep theirs
            graphs.append(_OwnerTracer().trace(owner, fixed or None))
    except Exception:  # any failure of the tracer means the same: this forward is left alone, hooks serve it
        return None
    finally:
        owner.__dict__.clear()
        owner.__dict__.update(state)
        owner.training = before
    targets = [(n.op, str(n.target)) for graph in graphs for n in graph.nodes if n.op in ("call_module", "get_attr")]
    lifted = any(op == "get_attr" and not _resolves(owner, target) for op, target in targets)
    named = all(is_path(target) for _, target in targets)
    return (graphs[0], graphs[1]) if named and not lifted else None


def _resolves(owner: nn.Module, path: str) -> bool:
    """Not for a tensor that the forward makes out of nothing: the tracer hangs it on the module for a while."""
    try:
        operator.attrgetter(path)(owner)
    except AttributeError:
        return False
    return True


def forwards_of(graphs: Sequence[Graph]) -> Forwards:
    train, evaluate = (ForwardCode.of(g) for g in graphs)
    return Forwards(train, train if train.source == evaluate.source else evaluate)
