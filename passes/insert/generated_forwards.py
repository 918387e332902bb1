"""Regenerated forwards: give one module instance a subclass whose `forward` is an FX graph's code.

`isinstance`, the class's name and every child's name stay. Instances whose code is equal share one class, so that
Dynamo compiles it once. Pickle stores the original class, the source and the functions it calls, and rebuilds.
"""

from __future__ import annotations

import functools
import importlib
import keyword
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from ltepass.errors import SourceNameError, shown
from ltepass.passes.capture.guard_replaced_forwards import guard
from ltepass.passes.capture.trace_owner import call as call  # forwards that were pickled earlier name it here
from ltepass.passes.capture.trace_owner import original_class
from ltepass.paths import is_path
from ltepass.threads import locks


@dataclass(frozen=True)
class _ModuleRef:
    """A Python module by name: pickle takes no modules."""

    name: str


@dataclass(frozen=True)
class ForwardCode:
    """Source of one `forward`, and the objects that it names (a tuple of pairs, so that it hashes)."""

    source: str
    names: tuple[tuple[str, object], ...]

    @staticmethod
    def of(graph: Graph) -> ForwardCode:
        _check_source_names(graph)
        code = graph.python_code("self")
        used = {k: v for k, v in code.globals.items() if re.search(rf"\b{re.escape(k)}\b", code.src)}
        refs = {k: _ModuleRef(v.__name__) if isinstance(v, ModuleType) else v for k, v in used.items()}
        return ForwardCode(code.src, tuple(sorted(refs.items())))

    def __deepcopy__(self, memo: dict[int, object]) -> ForwardCode:
        return self


def _check_source_names(graph: Graph) -> None:
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


def regenerate(module: nn.Module, forwards: Forwards) -> None:
    """Swap the module's class for one with these forwards."""
    module.__class__ = regenerated_class(original_class(module), forwards)
    guard(module)


def regenerated_class(original: type[nn.Module], forwards: Forwards) -> type[nn.Module]:
    key = (original, original.forward, forwards)
    return shared_class(key, lambda: _regenerated_class(original, forwards))


def _regenerated_class(original: type[nn.Module], forwards: Forwards) -> type[nn.Module]:
    train = _compile(forwards.train, original)
    evaluate = train if forwards.train == forwards.evaluate else _compile(forwards.evaluate, original)

    if train is evaluate:
        forward = train
    else:

        @functools.wraps(original.forward)
        def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
            return (train if self.training else evaluate)(self, *args, **kwargs)

    forward._lte_generated = True
    return subclass(original, {"forward": forward, "_lte_forwards": forwards}, _rebuild, (original, forwards))


# Equal code is one class for as long as an instance lives: Dynamo compiles it once, and no model leaves classes behind.
_classes: weakref.WeakValueDictionary[tuple[object, ...], type[nn.Module]] = weakref.WeakValueDictionary()


def shared_class(key: tuple[object, ...], make: Callable[[], type[nn.Module]]) -> type[nn.Module]:
    """The living class made for an equal key, else a new one."""
    with locks.classes:
        cls = _classes.get(key)
        if cls is None:
            cls = _classes[key] = make()
        return cls


def subclass(
    original: type[nn.Module], body: dict[str, object], rebuild: Callable[..., nn.Module], arguments: tuple[object, ...]
) -> type[nn.Module]:
    """A subclass that passes for the original. Pickle cannot import it by name, so it calls rebuild(*arguments)."""

    def reduce_ex(self: nn.Module, protocol: int) -> tuple[object, ...]:
        return rebuild, arguments, self.__getstate__()  # without what `module.compile()` bound to this instance

    def run(self: nn.Module, *args: object, **kwargs: object) -> object:
        if "forward" in self.__dict__ and not torch.compiler.is_compiling():
            guard(self)  # whichever way it came there: nobody above may look for it, where this module alone is called
        return original.__call__(self, *args, **kwargs)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        original.__setattr__(self, name, value)
        if name == "forward":
            guard(self)

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    ours = {"_lte_original": original, "_lte_was": original.forward}
    methods = {"__reduce_ex__": reduce_ex, "__setattr__": set_attribute, "__call__": run}
    return type(original.__name__, (original,), {**body, **names, **ours, **methods})


def _rebuild(original: type[nn.Module], forwards: Forwards) -> nn.Module:
    cls = regenerated_class(original, forwards)
    return cls.__new__(cls)


def _compile(code: ForwardCode, original: type[nn.Module]) -> Any:
    scope = {k: importlib.import_module(v.name) if isinstance(v, _ModuleRef) else v for k, v in code.names}
    exec(compile(code.source, f"<ltepass forward of {original.__qualname__}>", "exec"), scope)
    return scope["forward"]


def forwards_of(graphs: Sequence[Graph]) -> Forwards:
    train, evaluate = (ForwardCode.of(g) for g in graphs)
    return Forwards(train, train if train.source == evaluate.source else evaluate)
