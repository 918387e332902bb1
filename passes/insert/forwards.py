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
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Proxy, Tracer

from ltepass.errors import SourceNameError
from ltepass.names import is_path, shown
from ltepass.passes.insert.guarding import guard
from ltepass.passes.insert.straight import attributes, is_straight
from ltepass.routed.router import Router
from ltepass.threads import locks, tracing


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
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (train if self.training else evaluate)(self, *args, **kwargs)

    forward._lte_generated = True
    return subclass(original, {"forward": forward, "_lte_forwards": forwards}, _rebuild, (original, forwards))


# Equal code is one class for as long as an instance lives: Dynamo compiles it once, and no model leaves classes behind.
_classes: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def shared_class(key: tuple[Any, ...], make: Callable[[], type[nn.Module]]) -> type[nn.Module]:
    """The living class made for an equal key, else a new one."""
    with locks.classes:
        cls = _classes.get(key)
        if cls is None:
            cls = _classes[key] = make()
        return cls


def subclass(
    original: type[nn.Module], body: dict[str, Any], rebuild: Callable[..., nn.Module], arguments: tuple[Any, ...]
) -> type[nn.Module]:
    """A subclass that passes for the original. Pickle cannot import it by name, so it calls rebuild(*arguments)."""

    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        return rebuild, arguments, self.__getstate__()  # without what `module.compile()` bound to this instance

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
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


class _OwnerTracer(Tracer):
    """Children are leaves, so that whatever wraps a child later (LoRA, offload, quantised linears) is simply called.

    reads: attributes of the owner stay reads; else they are the values that they have now. While it traces, FX routes
    every module call of the process through here: those of other threads are let through.
    """

    def __init__(self, through: Collection[str], *, reads: bool) -> None:
        super().__init__()
        self.thread, self.through, self.reads = threading.get_ident(), through, reads

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(path.startswith(f"{module_qualified_name}.") for path in self.through)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        torch.fx._symbolic_trace._is_fx_tracing_flag = _InThisThread()  # type: ignore[assignment]
        function, given = super().create_args_for_root(*args, **kwargs)
        for name in attributes(given[0]) if self.reads else ():
            given[0].__dict__[name] = _Attribute(self.create_node("get_attr", name, (), {}), self)
        return function, given

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Attribute(Proxy):
    """Stands for an attribute of the owner that is no tensor and no module: a read in the forward stays a read."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_function", call, (self, *args), kwargs)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a generated forward calls an attribute with."""
    return function(*args, **kwargs)


class _InThisThread:
    """True in the thread that made it. FX's flag for "somebody traces" refuses compiled calls of every thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread


def traceable(original: type[nn.Module]) -> bool:
    """Only a forward that takes tensors and nothing optional is read right by symbolic tracing."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    return bool(parameters) and all(
        p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty and p.name != "kwargs" for p in parameters
    )


def trace_owner(
    owner: nn.Module, *, defaults: bool = False, through: Collection[str] = ()
) -> tuple[Graph, Graph] | None:
    """(training graph, evaluation graph) of the owner's original forward, or None where it cannot be traced.

    The owner itself is not touched: a stand-in that shares its attributes is traced. Routers are hidden from it: a
    Sequential would call every child that it holds. defaults: also a forward with options, at their defaults: to look
    at, not to run in its place. through: also inside of the children that hold these modules.
    """
    original = original_class(owner)
    if original.forward is nn.Module.forward:
        return None
    if not defaults and not (traceable(original) and is_straight(owner, original)):
        return None
    read = _at_defaults(original) if defaults else original
    graphs = []
    try:
        with tracing():
            for flag in (True, False):
                graphs.append(_OwnerTracer(through, reads=not defaults).trace(_stand_in(owner, read, training=flag)))
    except Exception:  # any failure of the tracer means the same: this forward is left alone, hooks serve it
        return None
    for graph in graphs:
        for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
            graph.erase_node(node)  # not read in this forward
    targets = [(n.op, str(n.target)) for graph in graphs for n in graph.nodes if n.op in ("call_module", "get_attr")]
    lifted = any(op == "get_attr" and not _resolves(owner, target) for op, target in targets)
    named = all(is_path(target) for _, target in targets)
    return (graphs[0], graphs[1]) if named and not lifted else None


def _at_defaults(original: type[nn.Module]) -> type[nn.Module]:
    """A class whose forward takes one input, and calls the original's, below its decorators, with its defaults."""
    inner = inspect.unwrap(original.forward)
    others = list(inspect.signature(inner).parameters.values())[2:]
    needed = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]

    def forward(self: nn.Module, x: Any) -> Any:
        return inner(self, x, *(x.tracer.create_proxy("placeholder", name, (), {}) for name in needed))

    return type(original.__name__, (original,), {"forward": forward})


def _stand_in(owner: nn.Module, original: type[nn.Module], *, training: bool) -> nn.Module:
    """The owner as it was before: its class, its attributes and children, and no router. The flag alone is set."""
    module: nn.Module = object.__new__(original)
    children = {k: m for k, m in owner._modules.items() if not isinstance(m, Router)}
    module.__dict__.update({**owner.__dict__, "_modules": children, "training": training})
    return module


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
