"""Gates for FFNs that lie inline in a bigger module (OPT's decoder layer, BERT's layer): guarded hooks.

An `InlineSite` holds names only and looks every module up when called:
  owner's forward   (a generated subclass around the original's) notes the owner of this call: a replica or a copy
                    brings its own router; afterwards it forgets, also when the forward raised
  up, before        scores = owner.router(x); up (and a gate linear beside it) sees what an input cut leaves of x
  down, before      hidden units are gated with these scores
The notes are per thread. The owner's part is a forward and no hook, because transformers' gradient checkpointing runs
a layer's forward again without its hooks. Who displaces a linear's hook (PEFT wraps or merges it) gets it attached
again at the next forward; a forward in which the gate was not applied raises instead of being silently dense.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltepass.errors import DisplacedHookError
from ltepass.passes.capture.guard_replaced_forwards import guard, guard_failed, release, replaced_forward
from ltepass.passes.capture.trace_owner import original_class
from ltepass.passes.insert.generated_forwards import shared_class, subclass
from ltepass.routed.gate import gate, seen_inputs
from ltepass.routed.router import Router
from ltepass.threads import interfered, locks, require_own

_calls = threading.local()


class _Note(NamedTuple):
    """Of one call of an owner: the scores that wait for the gate (of a lowered site: x), and whether it was applied."""

    owner: nn.Module
    kept: tuple[Tensor | None] | None = None
    gated: bool = False


@dataclass(frozen=True)
class InlineSite:
    """Names, relative to the owner, of one inline FFN's up linear, down linear and router.

    lowered: the down linear's forward is a `SparseDown`, which wants x and no scores; gate: of a gated FFN, the linear
    that holds the gate's rows (it may be the up linear).
    """

    key: str
    up: str
    down: str
    router: str
    gate: str = ""
    lowered: bool = False

    @property
    def slot(self) -> str:
        return self.key.replace(".", "/")  # Dynamo takes no dots in an attribute

    def hook(self, owner: nn.Module) -> None:
        """Place the hooks on the linears that the owner would call now, and nowhere else."""
        _unhook(owner, self.key)
        owner.get_submodule(self.up).register_forward_pre_hook(_UpBefore(self))
        if self.gate not in ("", self.up):
            owner.get_submodule(self.gate).register_forward_pre_hook(_GateBefore(self))
        owner.get_submodule(self.down).register_forward_pre_hook(_DownBefore(self))

    def in_place(self, owner: nn.Module) -> bool:
        hooks = [(self.up, _UpBefore), (self.down, _DownBefore)]
        hooks += [(self.gate, _GateBefore)] if self.gate not in ("", self.up) else []
        return all(_carries(owner.get_submodule(path), kind, self.key) for path, kind in hooks)


def attach(owner: nn.Module, sites: Sequence[InlineSite]) -> None:
    """Gate these FFNs of the owner; replaces whatever was attached before."""
    original = original_class(owner)
    owner.__class__ = _gated_class(original, tuple(sites))
    guard(owner)
    for site in sites:
        site.hook(owner)


def detach(owner: nn.Module, keys: Sequence[str]) -> None:
    """Remove every hook of these sites from whatever lies below the owner, and give the owner its class back."""
    for key in keys:
        _unhook(owner, key)
    owner.__class__ = original_class(owner)
    release(owner)


def _unhook(owner: nn.Module, key: str) -> None:
    for module in owner.modules():
        hooks = module._forward_pre_hooks
        for handle in [h for h, hook in hooks.items() if isinstance(hook, Hook) and hook.site.key == key]:
            del hooks[handle]


def _gated_class(original: type[nn.Module], sites: tuple[InlineSite, ...]) -> type[nn.Module]:
    return shared_class((original, original.forward, sites), lambda: _new_gated_class(original, sites))


def _new_gated_class(original: type[nn.Module], sites: tuple[InlineSite, ...]) -> type[nn.Module]:
    was = original.forward

    @functools.wraps(was)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        run, replaced = original.forward, was is not original.forward
        if "forward" in self.__dict__ and "_lte_forward" in self.__dict__:
            if _entered(sites[0], self):  # the forward that stands in this one's place calls what it replaced
                return run(self, *args, **kwargs)
            run, replaced = _replaced, True
        turns = _turns(sites, self)
        for site in sites:
            _enter(site, self)
        try:
            out = run(self, *args, **kwargs)
            for site in sites:
                _check_gated(site, self, replaced)
        finally:
            for site in sites:
                setattr(_calls, site.slot, None)
            if _turns(sites, self) != turns:  # its hooks may have been another thread's, half of them
                raise interfered()
        return out

    forward._lte_generated = forward._lte_guard = True  # type: ignore[attr-defined]
    return subclass(original, {"forward": forward, "_lte_guarded": forward}, _rebuild, (original, sites))


def _turns(sites: Sequence[InlineSite], owner: nn.Module) -> list[int]:
    """How often a call had each router to itself; ConcurrencyError while one of another thread has it.

    Asked before the first hook: a forward that began while hooks are exchanged finds the old ones of one linear and the
    new ones of the next, and at its end the same number of turns.
    """
    if torch.compiler.is_compiling():
        return []
    routers: list[Router] = [owner.get_submodule(site.router) for site in sites]  # type: ignore[misc]
    turns = [router.turns for router in routers]
    for router in routers:
        require_own(router)
    return turns


def _replaced(self: nn.Module, *args: object, **kwargs: object) -> object:
    return replaced_forward(self)(*args, **kwargs)


def _rebuild(original: type[nn.Module], sites: tuple[InlineSite, ...]) -> nn.Module:
    cls = _gated_class(original, sites)
    return cls.__new__(cls)


def _enter(site: InlineSite, owner: nn.Module) -> None:
    if not site.in_place(owner):
        if torch.compiler.is_compiling():
            raise DisplacedHookError(
                f"{site.key}: {site.up} or {site.down} was replaced after transform; expected the hooks of its gate; "
                "run one forward outside torch.compile to attach them again"
            )
        with locks.hooks:  # the second of two threads finds them in place
            if not site.in_place(owner):
                site.hook(owner)
    setattr(_calls, site.slot, _Note(owner))


def _entered(site: InlineSite, owner: nn.Module) -> bool:
    note = getattr(_calls, site.slot, None)
    return note is not None and note.owner is owner


def _check_gated(site: InlineSite, owner: nn.Module, replaced: bool) -> None:
    """A forward of the class itself may leave its FFN out; one that was put in its place must come by the gate."""
    note = _note(site)
    if replaced and not note.gated:
        raise guard_failed(owner)
    if note.kept is not None:
        raise DisplacedHookError(
            f"{site.key}: the forward ended and its gate was not applied; expected a call of {site.down}; remove "
            "whatever bypasses the module's hooks, or call ltepass.remove(model)"
        )


class Hook:
    def __init__(self, site: InlineSite) -> None:
        self.site = site


def _carries(module: nn.Module, kind: type[Hook], key: str) -> bool:
    return any(isinstance(h, kind) and h.site.key == key for h in module._forward_pre_hooks.values())


class _UpBefore(Hook):
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        owner = _note(self.site).owner
        kept = args[0] if self.site.lowered else owner.get_submodule(self.site.router)(args[0])
        setattr(_calls, self.site.slot, _Note(owner, (kept,)))
        return _seen(self.site, owner, args)


class _GateBefore(Hook):
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return _seen(self.site, _note(self.site).owner, args)


def _seen(site: InlineSite, owner: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A linear's arguments without what the router's input cut leaves out."""
    if site.lowered:
        return None
    return seen_inputs(owner.get_submodule(site.router), args[0]), *args[1:]  # type: ignore[arg-type]


class _DownBefore(Hook):
    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        owner, kept, _ = _note(self.site)
        if kept is None:
            raise DisplacedHookError(
                f"{self.site.key}: {self.site.down} ran before {self.site.up}; expected the up projection first; "
                "remove whatever bypasses the module's hooks, or call ltepass.remove(model)"
            )
        if self.site.lowered:
            return None  # SparseDown takes the note
        router = owner.get_submodule(self.site.router)
        setattr(_calls, self.site.slot, _Note(owner, gated=True))
        h: Tensor = args[0]
        return gate(router, h, kept[0]), *args[1:]  # type: ignore[arg-type]


class SparseDown:
    """The down linear's forward in a lowered inline site: the whole FFN from x; its own input is made of zeros.

    skipped: paths below the owner of modules that run on these zeros, and may carry no hooks, and of values read there.
    """

    def __init__(self, site: InlineSite, ffn: Callable[..., Tensor], skipped: Sequence[str]) -> None:
        self.site, self.ffn, self.skipped = site, ffn, tuple(skipped)

    def __call__(self, h: Tensor) -> Tensor:
        site = self.site
        owner, x, _ = _note(site)
        assert x is not None, "the down hook has checked it"
        setattr(_calls, site.slot, _Note(owner, gated=True))
        up, gate_linear = owner.get_submodule(site.up), owner.get_submodule(site.gate) if site.gate else None
        router, down = owner.get_submodule(site.router), owner.get_submodule(site.down)
        return self.ffn(router, up, gate_linear, down, x[0], *(attrgetter(path)(owner) for path in self.skipped))


def _note(site: InlineSite) -> _Note:
    note = getattr(_calls, site.slot, None)
    if note is None:
        raise DisplacedHookError(
            f"{site.key}: a linear of this FFN ran outside its owner's forward; expected a call through the owner, "
            "whose forward was bypassed; call ltepass.remove(model) and transform again"
        )
    return note  # type: ignore[no-any-return]
