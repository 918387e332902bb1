"""Whether a module runs the forward of its class, or another that somebody put on the instance."""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeGuard

from torch import nn


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
