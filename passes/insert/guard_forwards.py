"""A guard around a forward that somebody put in the place of one that is gated.

It raises where the call ended without the gate: some wrap the forward that they replace, and come by the gate; others
do not, and the FFN would be silently dense.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from torch import nn

from ltepass.errors import DisplacedHookError
from ltepass.passes.capture.replaced_forwards import is_guard, is_own
from ltepass.routed.gate import calls
from ltepass.routed.router import Router


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
