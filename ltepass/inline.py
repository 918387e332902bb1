"""Gates for FFNs that lie inline in a bigger module (OPT's decoder layer, BERT's layer): guarded hooks.

Four hooks of one `InlineSite`, which holds names only and looks every module up when called:
  owner, before   notes the owner of this call (a replica or a copy brings its own router)
  up, before      scores = owner.router(x)
  down, before    hidden units are gated with these scores
  owner, after    forgets both, also when the forward raised
The notes are per thread. Who displaces a hook (PEFT wraps or merges a linear) gets it attached again at the next
forward; a forward in which the gate was not applied raises DisplacedHookError instead of being silently dense.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import DisplacedHookError
from ltepass.router import gate

_calls = threading.local()


class InlineSite:
    """Names, relative to the owner, of one inline FFN's up linear, down linear and router.

    lowered: the down linear's forward is a `SparseDown`, which wants x and no scores; gate: the gate linear, or up.
    """

    def __init__(self, key: str, up: str, down: str, router: str, gate: str = "", lowered: bool = False) -> None:
        self.key, self.up, self.down, self.router, self.gate, self.lowered = key, up, down, router, gate, lowered
        self.slot = key.replace(".", "/")  # Dynamo takes no dots in an attribute

    def attach(self, owner: nn.Module) -> None:
        """Place the hooks; on a second call only those that are missing."""
        detach(owner, self.key)
        owner.register_forward_pre_hook(_OwnerBefore(self))
        owner.register_forward_hook(_OwnerAfter(self), always_call=True)
        owner.get_submodule(self.up).register_forward_pre_hook(_UpBefore(self))
        owner.get_submodule(self.down).register_forward_pre_hook(_DownBefore(self))

    def in_place(self, owner: nn.Module) -> bool:
        """Whether the linears that the owner would call now are the ones that carry the hooks."""
        up, down = owner.get_submodule(self.up), owner.get_submodule(self.down)
        return _carries(up, _UpBefore, self.key) and _carries(down, _DownBefore, self.key)


def detach(owner: nn.Module, key: str) -> None:
    """Remove every hook of a site from the owner and from whatever lies below it."""
    for module in owner.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for handle in [h for h, hook in hooks.items() if isinstance(hook, _Hook) and hook.site.key == key]:
                del hooks[handle]


class _Hook:
    def __init__(self, site: InlineSite) -> None:
        self.site = site


def _carries(module: nn.Module, kind: type[_Hook], key: str) -> bool:
    return any(type(h) is kind and h.site.key == key for h in module._forward_pre_hooks.values())


class _OwnerBefore(_Hook):
    def __call__(self, owner: nn.Module, args: Any) -> None:
        site = self.site
        if not site.in_place(owner):
            if torch.compiler.is_compiling():
                raise DisplacedHookError(
                    f"{site.key}: {site.up} or {site.down} was replaced after transform; expected the hooks of its gate; "
                    "run one forward outside torch.compile to attach them again"
                )
            site.attach(owner)
        setattr(_calls, site.slot, (owner, None))


class _UpBefore(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        owner, _ = _note(self.site)
        kept = args[0] if self.site.lowered else owner.get_submodule(self.site.router)(args[0])
        setattr(_calls, self.site.slot, (owner, (kept,)))


class _DownBefore(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        owner, scores = _note(self.site)
        if scores is None:
            raise DisplacedHookError(
                f"{self.site.key}: {self.site.down} ran before {self.site.up}; expected the up projection first; "
                "remove whatever bypasses the module's hooks, or call ltepass.remove(model)"
            )
        if self.site.lowered:
            return None  # SparseDown takes the note
        router = owner.get_submodule(self.site.router)
        setattr(_calls, self.site.slot, (owner, None))
        h: Tensor = args[0]
        return gate(router, h, scores[0]), *args[1:]


class SparseDown:
    """The down linear's forward in a lowered inline site: the whole FFN from x; its own input is made of zeros."""

    def __init__(self, site: InlineSite, ffn: Callable[..., Tensor]) -> None:
        self.site, self.ffn = site, ffn

    def __call__(self, h: Tensor) -> Tensor:
        site = self.site
        owner, x = _note(site)
        assert x is not None, "the down hook has checked it"
        setattr(_calls, site.slot, (owner, None))
        up, gate_linear = owner.get_submodule(site.up), owner.get_submodule(site.gate)
        router, down = owner.get_submodule(site.router), owner.get_submodule(site.down)
        return self.ffn(router, up, gate_linear if gate_linear is not up else None, down, x[0])


class _OwnerAfter(_Hook):
    def __call__(self, owner: nn.Module, args: Any, out: Any) -> None:
        _, scores = _note(self.site)
        setattr(_calls, self.site.slot, None)
        if scores is not None and out is not None:  # out is None where the forward raised: its error is the one to show
            raise DisplacedHookError(
                f"{self.site.key}: the forward ended and its gate was not applied; expected a call of {self.site.down}; "
                "remove whatever bypasses the module's hooks, or call ltepass.remove(model)"
            )


def _note(site: InlineSite) -> tuple[nn.Module, tuple[Tensor | None] | None]:
    note = getattr(_calls, site.slot, None)
    if note is None:
        raise DisplacedHookError(
            f"{site.key}: a linear of this FFN ran outside its owner's forward; expected a call through the owner, "
            "whose hooks were removed or bypassed; call ltepass.remove(model) and transform again"
        )
    return note  # type: ignore[no-any-return]
