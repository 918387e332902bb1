"""Forwards that are not the class's: libraries replace them on instances (fused kernels, offload hooks, compilation).

Before transform: the owner is gated by hooks on its linears, whichever forward calls them (hooks.py).
Afterwards: the new forward runs inside a guard (guard_forwards.py).
"""

from __future__ import annotations

from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


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


def bring_back(model: nn.Module) -> None:
    """Take accelerate's hooks away, and stand-ins for the weights that they fetch: they move tensors, and a trace
    computes nothing. Inside `untouched`, which puts all of it back.
    """
    for module in model.modules():
        if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
            module.__dict__["forward"] = module.__dict__["_old_forward"]
            for held in (module._parameters, module._buffers):
                held.update({k: _stand_in(t) for k, t in held.items() if t is not None and t.is_meta})


def _stand_in(tensor: Tensor) -> nn.Parameter:
    """Of the same shape and dtype, on the CPU, in the memory of one number."""
    one = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(one, requires_grad=False) if isinstance(tensor, nn.Parameter) else one  # type: ignore[return-value]
