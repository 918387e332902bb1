"""What transform has built is tried before the user gets it: each owner runs on two random tokens.

In dense mode it computes what its own class computes; every gate is called; with closed gates nothing reaches down.
A copy of the owner runs, which shares the weights and nothing else: no hook of the user's sees the calls, no buffer or
cache changes, and random numbers are as before.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ltepass.errors import GateError
from ltepass.passes.capture.trace_owner import original_class
from ltepass.passes.insert.hooks import Hook
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite

TOKENS = 2
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_HELD = (dict, list, set)
_FORWARDS = ("forward", "_lte_forward", "_old_forward")  # what an instance may hold of itself


def check_gated(model: nn.Module, sites: Sequence[FFNSite]) -> list[str]:
    """Try every owner; returns a line for those that could not be tried. Raises GateError where a gate does not act."""
    in_modules = sorted((s for s in sites if s.kind != "graph"), key=lambda s: s.owner)
    skipped: dict[str, list[str]] = {}
    with torch.no_grad():
        for path, group in groupby(in_modules, key=lambda s: s.owner):
            reason = _try(model.get_submodule(path), list(group))
            if reason is not None:
                skipped.setdefault(reason, []).append(path or type(model).__name__)
    return [f"{', '.join(paths)}: not tried on random tokens: {reason}" for reason, paths in skipped.items()]


def _try(owner: nn.Module, sites: Sequence[FFNSite]) -> str | None:
    """Run copies of one owner; why not, where that cannot be."""
    if any(p.is_meta for p in owner.parameters()):
        return "there are no weights to try (the meta device, or offloaded)"
    x, gated = _tokens(owner, sites[0]), _copy(owner, {})
    try:
        expected = _run(_ungated(owner), x)
    except Exception:  # whatever it says of made-up inputs: it takes others
        return "their forward does not take one tensor alone"
    called, reached = set[str](), dict[str, Tensor]()
    for site in sites:
        router, down = (gated.get_submodule(_below(site, path)) for path in (site.router, site.down))
        assert isinstance(router, Router)
        router.mode, router.observer = "dense", functools.partial(_note_call, called, site)
        down.register_forward_pre_hook(functools.partial(_note_input, reached, site.name))
    got = _run(gated, x)
    for site in sites:
        if site.name not in called:
            raise GateError(f"{site.name}: its gate was not called; {_SAY}")
    if not all(map(_close, pytree.tree_leaves(got), pytree.tree_leaves(expected))):
        raise GateError(f"{sites[0].owner}: with its gate in dense mode it computes something else; {_SAY}")
    for router in (m for m in gated.modules() if isinstance(m, Router)):
        router.mode, router.threshold = "hard", torch.full_like(router.threshold, math.inf)
    _run(gated, x)
    for site in sites:
        if torch.nan_to_num(reached[site.name]).count_nonzero():
            raise GateError(f"{site.name}: hidden units reach {site.down} through a closed gate; {_SAY}")
    return None


_SAY = "the model is as it was; please report this class, and pass the model without what changes its forward"


def _below(site: FFNSite, path: str) -> str:
    return path[len(site.owner) + 1 :] if site.owner else path


def _note_call(called: set[str], site: FFNSite, h: Tensor) -> None:
    if h.shape[-1] == site.d_ff:
        called.add(site.name)


def _note_input(reached: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    reached[name] = args[0]


def _tokens(owner: nn.Module, site: FFNSite) -> Tensor:
    """[1, 2, d_model] of the owner's dtype and device."""
    floats = [p for p in owner.parameters() if p.is_floating_point()]
    linears = [p for p in floats if p.dtype != torch.float32] or floats  # beside a router's, which are fp32 always
    like = linears[0] if linears else torch.empty(0, device="cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, site.d_model, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(like.device, like.dtype)


def _run(module: nn.Module, x: Tensor) -> object:
    """Try a module on x, with the same random numbers each time, and those of the process as before."""
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return module(x.clone())


def _close(got: object, expected: object) -> bool:
    """Whether a copy gave what was expected, to the rounding of its dtype."""
    if not isinstance(expected, Tensor):
        return True
    try:
        torch.testing.assert_close(got, expected, equal_nan=True)
    except AssertionError:
        return False
    return True


def _ungated(owner: nn.Module) -> nn.Module:
    """A copy of the owner as its own class has it, with the forward that was put on the instance."""
    module = _copy(owner, {})
    module.__class__ = original_class(owner)
    for m in module.modules():
        m._forward_pre_hooks.clear()
        m._modules = {k: c for k, c in m._modules.items() if not isinstance(c, Router)}
    found = module.__dict__.pop("_lte_forward", None)
    if found is not None:
        module.__dict__["forward"] = found
    return module


def _copy(module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
    """Shares parameters; buffers and containers are its own, and of the hooks only ours are left."""
    if id(module) in copies:
        return copies[id(module)]
    new = copies[id(module)] = object.__new__(type(module))
    own: dict[str, Any] = {k: copy.copy(v) if isinstance(v, _HELD) else v for k, v in module.__dict__.items()}
    own.pop("_compiled_call_impl", None)  # bound to the original
    own.update({name: type(own[name])() for name in _HOOKS})
    own["_forward_pre_hooks"] = OrderedDict(i for i in own["_forward_pre_hooks"].items() if isinstance(i[1], Hook))
    own["_buffers"] = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    own["_modules"] = {k: m if m is None else _copy(m, copies) for k, m in module._modules.items()}
    new.__dict__.update(own)
    for name in _FORWARDS:
        if name in own:
            new.__dict__[name] = _rebound(own[name], module, new)
    return new


def _rebound(forward: object, old: nn.Module, new: nn.Module) -> object:
    """A forward that stands on an instance, for the instance's copy."""
    if isinstance(forward, MethodType) and forward.__self__ is old:
        return MethodType(forward.__func__, new)
    if isinstance(forward, functools.partial):
        return functools.partial(forward.func, *(new if a is old else a for a in forward.args), **forward.keywords)
    return forward
