"""Forwards that are not the class's: libraries replace them on instances (fused kernels, offload hooks, compilation).

Before transform: the owner is gated by hooks on its linears, whichever forward calls them (hooks.py).
Afterwards: the new one runs inside a guard, which raises where the call ended without the gate: some wrap what they
replace; others do not, and the FFN would be silently dense. A `Watch`, a hook above the blocks, finds new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.fx import GraphModule

from ltepass.errors import DisplacedHookError
from ltepass.routed.gate import calls
from ltepass.routed.router import Router

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def is_replaced(module: nn.Module) -> bool:
    """Whether this instance runs another forward than its class's, and than the one that transform traced."""
    found = module.__dict__.get("forward")
    if is_guard(found):
        return module.__dict__["_lte_forward"] is not module.__dict__.get("_lte_traced", found)
    return found is not None and not is_own(module, found)


def is_own(module: nn.Module, forward: Any) -> bool:
    """The class's own forward, bound: what accelerate leaves on an instance when it takes its hooks away."""
    function = getattr(forward, "__func__", None)
    own = (type(module).forward, getattr(type(module), "_lte_original", type(module)).forward)
    return forward.__self__ is module if function in own or hasattr(function, "_lte_generated") else False


def is_guard(forward: object) -> TypeGuard[MethodType]:
    return hasattr(getattr(forward, "__func__", None), "_lte_guard")


def guarded(self: nn.Module, *args: object, **kwargs: object) -> object:
    """The forward of a module whose forward was replaced: that one, and every gate below was applied in it."""
    outer = getattr(calls, "gates", 0)
    calls.gates = 0
    try:
        out = replaced_forward(self)(*args, **kwargs)
        gates = calls.gates
    finally:
        calls.gates = outer
    if gates < self.__dict__["_lte_gates"]:
        raise guard_failed(self)
    calls.gates = outer + gates
    return out


guarded._lte_guard = True  # type: ignore[attr-defined]


def guard_failed(module: nn.Module) -> DisplacedHookError:
    return DisplacedHookError(
        f"{type(module).__name__}.forward was replaced after ltepass.transform, and the new one runs without the gate "
        "of its FFN; expected one that calls the forward it replaces; put that one back, or call "
        "ltepass.remove(model), replace it, and transform again"
    )


def replaced_forward(module: nn.Module) -> Callable[..., object]:
    """What somebody put in the forward's place: on the instance, or (None) on its class."""
    return module.__dict__["_lte_forward"] or MethodType(type(module).forward, module)


def remember(module: nn.Module) -> None:
    """The forward that stands on the instance now is what transform has traced."""
    if "_lte_forward" in module.__dict__:
        module.__dict__["_lte_traced"] = module.__dict__["_lte_forward"]


def guard(module: nn.Module, gates: int = 1) -> None:
    """Put the guard around a replaced forward. gates: how many its call must apply. A guard of a former class is set
    anew; nothing happens where the class's forward runs.
    """
    found = module.__dict__.get("forward")
    if found is not None and not is_guard(found) and is_own(module, found):
        del module.__dict__["forward"]
    elif found is not None:
        set_guard(module, gates, module.__dict__["_lte_forward"] if is_guard(found) else found)


def set_guard(module: nn.Module, gates: int, found: Callable[..., object] | None) -> None:
    """From now on `found`, which replaced the class's forward (None: the class's own), runs inside a guard."""
    own, function = module.__dict__, getattr(type(module), "_lte_guarded", guarded)
    now = own.get("forward")
    if is_guard(now) and now.__func__ is function and (own["_lte_forward"], own["_lte_gates"]) == (found, gates):
        return
    for router in (m for m in module.modules() if isinstance(m, Router)):
        router.watched = True
    own.update(_lte_forward=found, _lte_gates=gates, forward=MethodType(function, module))


def release(module: nn.Module) -> None:
    """Take a guard away again: the forward that it found is back, and runs the class's own."""
    if is_guard(module.__dict__.get("forward")):
        del module.__dict__["forward"], module.__dict__["_lte_gates"]
        found = module.__dict__.pop("_lte_forward")
        module.__dict__.pop("_lte_traced", None)
        if found is not None:
            module.__dict__["forward"] = found
    kept = module.__dict__.get("_old_forward")  # where accelerate's hooks keep what they wrap
    if hasattr(getattr(kept, "__func__", None), "_lte_generated"):
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


class Watch:
    """A forward pre-hook of the module that calls the blocks: finds forwards and classes that were replaced since.

    owners: paths from that module to the owners of gated FFNs below it, and the number of sites of each.
    """

    def __init__(self, module: nn.Module, owners: Mapping[str, int]) -> None:
        self.owners = dict(owners)
        self.paths = [tuple(path.split(".")) if path else () for path in owners]
        self.forwards: dict[type, Callable[..., object]] = {}
        for path in self.paths:
            self._learn(module, path)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "forwards": {}}  # functions of classes, which not every pickle can take

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.check(module)

    def check(self, module: nn.Module) -> None:
        """Raises DisplacedHookError where an owner is gone, or its class's forward is another one."""
        if () in self.paths and "forward" in module.__dict__ and not is_guard(module.__dict__["forward"]):
            raise guard_failed(module)  # of the module that is called: too late for a guard
        if not self.forwards:
            for path in self.paths:
                self._learn(module, path)
        forwards = self.forwards
        for path in self.paths:
            here: Any = module
            for name in path:
                here = here._modules.get(name)
                if here is None:
                    break
                if "forward" in here.__dict__ or forwards.get(type(here)) is not type(here).forward:
                    self._look(module, here, path)
            if here is None or not hasattr(type(here), "_lte_original"):
                self._missing(module, path)
            elif type(here)._lte_was is not type(here)._lte_original.forward:
                _class_was_patched(here)

    def _learn(self, module: nn.Module, path: tuple[str, ...]) -> None:
        for here in _along(module, path):
            self.forwards[type(here)] = type(here).forward

    def _look(self, module: nn.Module, here: nn.Module, path: tuple[str, ...]) -> None:
        """A forward or a class on the path is another one: guard it, where it is not ours."""
        below = ".".join(path[: list(_along(module, path)).index(here) + 1])
        gates = sum(n for owner, n in self.owners.items() if f"{owner}.".startswith(f"{below}."))
        if "forward" in here.__dict__:
            guard(here, gates)
        elif type(here).forward in self.forwards.values() or hasattr(type(here).forward, "_lte_generated"):
            self.forwards[type(here)] = type(here).forward  # a class that FSDP made of the one that stood here, or ours
        else:  # the class's was replaced, or the class
            set_guard(here, gates, None)

    def _missing(self, module: nn.Module, path: tuple[str, ...]) -> None:
        """Something wraps the owner or a block, or stands in its place."""
        if not isinstance(module, GraphModule):
            *_, last = _along(module, path)
            if not any(hasattr(type(m), "_lte_original") for m in last.modules()):
                raise DisplacedHookError(
                    f"{'.'.join(path) or type(module).__name__} is now a {type(last).__name__}: its class was changed "
                    "or the module replaced after ltepass.transform, and its FFN has no gate; expected the module that "
                    "was gated; put it back, or call ltepass.remove(model), replace it, and transform again"
                )
        self.paths = [p for p in self.paths if p != path]  # wrapped, and not looked into again


def _along(module: nn.Module, path: Iterable[str]) -> Iterator[nn.Module]:
    """The modules on a path below `module`, as far as it goes; `module` itself where it is empty."""
    yield from () if path else (module,)
    for name in path:
        below = module._modules.get(name)
        if below is None:
            return
        module = below
        yield module


def _class_was_patched(owner: nn.Module) -> None:
    if not hasattr(type(owner), "_lte_guarded"):  # hooks gate whatever forward calls the linears
        raise guard_failed(owner)


def watch(model: nn.Module, owners: Iterable[str]) -> None:
    """Look, at every call of the modules that call these owners' blocks, whether their forwards are still gated."""
    unwatch(model)
    found: dict[str, dict[str, int]] = {}
    for owner in owners:
        above = _caller(model, owner)
        below = found.setdefault(above, {})
        path = owner[len(above) :].lstrip(".")
        below[path] = below.get(path, 0) + 1
    for above, below in found.items():
        module = model.get_submodule(above)
        module.register_forward_pre_hook(Watch(module, below))


def watches(model: nn.Module) -> Iterator[tuple[nn.Module, int, Watch]]:
    for module in model.modules():
        for handle, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Watch):
                yield module, handle, hook


def unwatch(model: nn.Module) -> None:
    for module, handle, _ in watches(model):
        del module._forward_pre_hooks[handle]


def check_forwards(model: nn.Module) -> None:
    """Raises DisplacedHookError where an owner's class is another one, or its forward is."""
    for module, _, hook in watches(model):
        hook.check(module)
        for path in hook.paths:
            *_, owner = _along(module, path)
            if hasattr(type(owner), "_lte_original") and not hasattr(type(owner).forward, "_lte_generated"):
                raise guard_failed(owner)


def _caller(model: nn.Module, owner: str) -> str:
    """Where the hook hangs that looks for replaced forwards: the module that calls an owner's block, above the
    outermost list of blocks.
    """
    parts = owner.split(".") if owner else []
    for i in range(len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), _LISTS):
            parts = parts[:i]
            break
    while parts and (len(parts) == owner.count(".") + 1 or not _is_called(model.get_submodule(".".join(parts)))):
        parts = parts[:-1]
    return ".".join(parts)


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
