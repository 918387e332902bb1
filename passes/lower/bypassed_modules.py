"""What an op that stands for a whole FFN passes by: modules, their hooks and their forwards, which would have run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.module import _has_any_global_hook

from ltepass.errors import LoweredError
from ltepass.passes.capture.guard_replaced_forwards import is_replaced
from ltepass.passes.capture.straight_forward import attributes
from ltepass.passes.graph.shared_names import join
from ltepass.passes.insert.check_activation import (
    activations_beside,
    called_before_gate,
)
from ltepass.passes.insert.hooks import Hook, SparseDown
from ltepass.passes.lower.stubs import Stub
from ltepass.passes.lower.why_not_linear import is_product, not_plain
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite

GLOBAL_HOOK = (
    "a hook for all modules (torch.nn.modules.module.register_module_forward_hook) is one that the op would bypass"
)


def idle(model: nn.Module, site: FFNSite) -> list[str]:
    """Beside the linears, what is not called where the op stands, or runs on zeros: nobody may look there."""
    if site.kind == "graph":
        return with_inner(model, (*called_before_gate(model, site), site.router))
    return with_inner(model, (*activations_beside(model, site), site.router)) + _around(site)


def with_inner(root: nn.Module, paths: Iterable[str]) -> list[str]:
    """These paths, and those of all modules below."""
    found = (join(path, name) for path in paths for name, _ in root.get_submodule(path).named_modules())
    return list(dict.fromkeys(found))


def _around(site: FFNSite) -> list[str]:
    """The modules below the owner that call a linear, which take or hand on zeros."""
    found: dict[str, None] = {}
    for path in (site.up, site.gate or site.up, site.down):
        parent = path.rpartition(".")[0]
        while len(parent) > len(site.owner):
            found[parent] = None
            parent = parent.rpartition(".")[0]
    return list(found)


def called_modules(called: Graph | nn.Module) -> set[str]:
    """Paths of the modules that a graph, or a user's GraphModule, calls."""
    assert isinstance(called, (Graph, GraphModule))
    graph = called if isinstance(called, Graph) else called.graph
    return {str(n.target) for n in graph.nodes if n.op == "call_module"}


def bypassed_code(module: nn.Module) -> str | None:
    """What runs with this module's call, and would not where the op stands in its place."""
    if untouched(module):
        return None
    hooks = [h for name in _HOOKS for h in module.__dict__[name].values() if not isinstance(h, Hook)]
    if hooks:
        name = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        return f"carries a hook, {name}, which the op would bypass"
    return "runs a forward that was put on the instance, which the op would bypass"


def untouched(module: nn.Module) -> bool:
    """No hooks but ours, no other forward than the class's or ours; in as little time as can be."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    before = own["_forward_pre_hooks"]
    if before and not all(isinstance(h, Hook) for h in before.values()):
        return False
    return "forward" not in own or isinstance(own["forward"], (Stub, SparseDown)) or not is_replaced(module)


def plain(module: nn.Module) -> bool:
    """Whether a module's call is a matrix product, and nothing runs with it."""
    return (type(module) is nn.Linear or is_product(module)) and untouched(module)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


Settings = tuple[tuple[str, object], ...]
"""Names and values of what a module computes with."""

_GONE = object()


def settings(module: object, *, runs: bool) -> Settings:
    """What a skipped module holds beside its children: who changes it in place later changes what the op stands for.

    Tensors are not among them: no kernel knows an activation that reads one.
    runs: it is called on zeros, and may count its calls: its integers say nothing.
    """
    if not isinstance(module, nn.Module) or isinstance(module, Router):
        return ()
    kinds = (str, bool, float, tuple, NoneType, FunctionType, BuiltinFunctionType)
    own = {name: module.__dict__[name] for name in attributes(module)}
    counts = (int,) if not runs else ()
    return tuple((name, value) for name, value in own.items() if isinstance(value, kinds + counts))


def check_bypassed(
    linears: Iterable[nn.Module],
    skipped: Sequence[object],
    before: Sequence[object],
    kept: Sequence[Settings],
) -> None:
    """Raises LoweredError where something would have run with a call of these, had the op not stood in their place.

    before: what was skipped when the site was lowered; nothing where a pickle is older than this.
    kept: the settings of each, then.
    """
    for module in linears:
        if not plain(module):
            raise _added_later(f"{type(module).__name__} {bypassed_code(module) or not_plain(module) or 'was changed'}")
    for now, was in zip(skipped, before or skipped, strict=True):
        if now is not was and not _is_copy(now, was):
            raise _added_later(f"{_called(now)} has taken the place of {_called(was)}")
        if isinstance(now, nn.Module) and not untouched(now):
            raise _added_later(f"{type(now).__name__} {bypassed_code(now) or 'was changed'}")
    for now, values in zip(skipped, kept, strict=bool(kept)):
        for name, value in values:
            held = getattr(now, name, _GONE)
            if held is not value and (type(held) is not type(value) or held != value):
                raise _added_later(f"the setting {name!r} of {_called(now)} is no longer {value!r}")
    if _has_any_global_hook():
        raise _added_later(GLOBAL_HOOK)


def _is_copy(now: object, was: object) -> bool:
    """Whether what a bypassed place holds now is the same again: a replica of DataParallel's, or read from a pickle."""
    if type(now) is not type(was):
        return False
    if isinstance(now, nn.Module) and isinstance(was, nn.Module):
        return all(now.__dict__.get(name) == was.__dict__[name] for name in attributes(was))
    return isinstance(now, (int, float, str, MethodType)) and now == was


def _called(value: object) -> str:
    """For a message."""
    name = getattr(value, "__name__", None)
    return f"a {type(value).__name__}" if name is None else f"the function {name}"


def _added_later(what: str) -> LoweredError:
    return LoweredError(
        f"{what}: it was added after ltepass.lower; call ltepass.unlower(model) before, then lower again"
    )


def called_between(root: nn.Module, inputs: dict[Node, list[Node]], left: set[Node]) -> list[str]:
    """What the op bypasses of a graph: modules that the nodes which are gone called, and values that they read."""
    gone = [n for n in inputs if n not in left]
    modules = {str(n.target) for n in gone if n.op == "call_module"}
    read = {str(n.target) for node in gone for n in (node, *inputs[node]) if n.op == "get_attr"}
    values = [path for path in read if not isinstance(attrgetter(path)(root), (Tensor, nn.Module))]
    return with_inner(root, sorted(modules)) + sorted(values)
