"""The graphs of an owner's own forward, traced with its children as leaves."""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Graph, Proxy, Tracer

from ltepass.passes.capture.straight_forward import attributes, is_straight, traceable
from ltepass.paths import is_path
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import interrupts_wait
from ltepass.threads import tracing

T = TypeVar("T")
OwnerGraphs = tuple[Graph, Graph]  # of one forward: in training, in evaluation


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before its forward was regenerated."""
    return getattr(type(module), "_lte_original", type(module))


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

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[object, list[Any]]:
        torch.fx._symbolic_trace._is_fx_tracing_flag = _InThisThread()  # type: ignore[assignment]
        function, given = super().create_args_for_root(*args, **kwargs)
        for name in attributes(given[0]) if self.reads else ():
            given[0].__dict__[name] = _Attribute(self.create_node("get_attr", name, (), {}), self)
        return function, given

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if self.submodule_paths is not None and m not in self.submodule_paths:
            return forward(*args, **kwargs)  # held by nobody here, as what ACT2FN[name] makes: its own lines
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: object, parameter_proxy_cache: dict[str, Proxy]) -> object:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Attribute(Proxy):
    """Stands for an attribute of the owner that is no tensor and no module: a read in the forward stays a read."""

    def __call__(self, *args: object, **kwargs: object) -> Proxy:
        return self.tracer.create_proxy("call_function", call, (self, *args), kwargs)


def call(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """What a generated forward calls an attribute with."""
    return function(*args, **kwargs)


class _InThisThread:
    """True in the thread that made it. FX's flag for "somebody traces" refuses compiled calls of every thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self.thread


def trace_owner(owner: nn.Module, *, defaults: bool = False, through: Collection[str] = ()) -> OwnerGraphs | None:
    """The graphs of the owner's original forward, or None where it cannot be traced.

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
        with interrupts_wait(), tracing():  # torch.fx patches nn.Module: half taken back, no model would run any more
            for flag in (True, False):
                graphs.append(_OwnerTracer(through, reads=not defaults).trace(_stand_in(owner, read, training=flag)))
    except MemoryError:
        raise
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
    """A class to trace whose forward takes one input, and calls the original's, below its decorators, with its
    defaults.
    """
    inner = inspect.unwrap(original.forward)
    others = list(inspect.signature(inner).parameters.values())[2:]
    needed = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]

    def forward(self: nn.Module, x: Proxy) -> object:
        return inner(self, x, *(x.tracer.create_proxy("placeholder", name, (), {}) for name in needed))

    return type(original.__name__, (original,), {"forward": forward})


def _stand_in(owner: nn.Module, original: type[nn.Module], *, training: bool) -> nn.Module:
    """What is traced in the owner's place: its class, its attributes and children as they were, and no router. The flag
    alone is set.
    """
    module: nn.Module = object.__new__(original)
    children = {k: m for k, m in owner._modules.items() if not isinstance(m, Router)}
    module.__dict__.update({**owner.__dict__, "_modules": children, "training": training})
    return module


def _resolves(owner: nn.Module, path: str) -> bool:
    """Whether what a traced graph reads is the owner's: no tensor that the forward makes, which the tracer hangs on it
    for a while.
    """
    try:
        operator.attrgetter(path)(owner)
    except AttributeError:
        return False
    return True


def own_graphs(owner: nn.Module, site: FFNSite) -> tuple[Graph, ...] | None:
    """The owner's own forward, in training and evaluation; none where hooks serve it and it cannot be read.

    None where nothing else could serve it.
    """
    if site.kind == "inline":
        graphs = trace_owner(owner, defaults=True) or ()
        return graphs if all(times_called(graph, path) == 1 for graph in graphs for path in linears(site)) else ()
    return trace_owner(owner)


def linears(site: FFNSite) -> list[str]:
    """Of up, gate and down, seen from the owner."""
    cut = len(site.owner) + 1 if site.owner else 0
    return [path[cut:] for path in (site.up, site.gate or site.up, site.down)]


def times_called(graph: Graph, path: str) -> int:
    return sum(n.op == "call_module" and n.target == path for n in graph.nodes)
