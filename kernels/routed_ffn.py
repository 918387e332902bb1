"""`ltepass::routed_ffn` and `routed_proxy_ffn`, and both with weights in codes: fake, autograd and dispatch.

Importing this registers the ops and builds nothing. The C++ kernel registers itself for CPU when it is loaded, on the
first CPU call; until then, and on a machine without a compiler, CPU calls land in `_plain` below, which is also what
any other device gets.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch leaves Library.impl untyped)
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import dispatch
from ltepass.kernels.dispatch import any_device, vmap_over_x
from ltepass.kernels.routed_ffn_backward import hard_ffn
from ltepass.kernels.routed_schema import IN_CODES, LINEAR, PROXY, RoutedOp

_library = torch.library.Library("ltepass", "FRAGMENT")
# The active share from which the C++ kernel leaves this many tokens to PyTorch's own GEMMs; above 1: it never does.
_library.define("_dense_above(Tensor x, int tokens, int group) -> float")


for _op in (LINEAR, PROXY):
    # The second is the same without an autograd rule, whose Python frame every call would go through. The third has
    # the decision beside the result: mask bool [..., n_experts] and count int64 [], the number of (token, expert) pairs
    # that were active. Tests compare masks first; the autograd formula keeps the mask it returns.
    for _name, _result in (
        (_op.name, "Tensor"),
        (f"_{_op.name}_no_grad", "Tensor"),
        (f"{_op.name}_with_mask", "(Tensor, Tensor, Tensor)"),
    ):
        _library.define(f"{_name}{_op.arguments} -> {_result}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(f"{_op.plain}{_op.arguments} -> (Tensor, Tensor)")  # for a dtype that C++ has no code for


def _plain(op: RoutedOp, with_mask: bool, *args: object) -> Any:
    c = op.checked(args)
    active = op.mask(c)
    y = op.masked_ffn(c, active)
    return (y, active, active.sum()) if with_mask else y


def _cuda(*args: Any) -> Tensor:
    from ltepass.kernels.gpu import launch

    if LINEAR.checked(args).input_cut is not None:
        return _plain(LINEAR, False, *args)  # type: ignore[no-any-return]  # rows of up and gate lie whole on a GPU
    return launch.routed_ffn(*args[: LINEAR.n_tensors + 2])


def _cuda_with_mask(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ltepass.kernels.gpu import launch

    if LINEAR.checked(args).input_cut is not None:
        return _plain(LINEAR, True, *args)  # type: ignore[no-any-return]
    y, active = launch.routed_ffn_with_mask(*args[: LINEAR.n_tensors + 2])
    return y, active, active.sum()


def _fake(op: RoutedOp, with_mask: bool) -> Callable[..., object]:
    def call(*args: object) -> object:
        c = op.checked(args)
        y = c.x.new_empty((*c.x.shape[:-1], op.d_out(c)))
        if not with_mask:
            return y
        mask = c.x.new_empty((*c.x.shape[:-1], op.n_experts(c)), dtype=torch.bool)
        return y, mask, c.x.new_empty((), dtype=torch.int64)

    return call


def _batched_mask(results: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Results of `_with_mask` and their places under vmap: each call has a count of its own."""
    y, mask, _ = results
    return (y, mask, mask.flatten(1).sum(1)), (0, 0, 0)


def _register(op: RoutedOp) -> None:
    _library.impl(op.plain, lambda *args: _plain(op, True, *args)[:2], "CompositeExplicitAutograd")
    function = hard_ffn(op)
    for name, with_mask, differentiable in (
        (op.name, False, True),
        (f"_{op.name}_no_grad", False, False),
        (f"{op.name}_with_mask", True, True),
    ):
        public = getattr(torch.ops.ltepass, name).default
        _library.impl(name, any_device(public, partial(_plain, op, with_mask)), "CompositeExplicitAutograd")
        if op is LINEAR:
            _library.impl(name, _cuda_with_mask if with_mask else _cuda, "CUDA")
        if differentiable:
            taken = (lambda outputs: outputs) if with_mask else itemgetter(0)
            rule = dispatch.rule(public, function, "ltepass.unlower(model) and the masked form", taken)
            _library.impl(name, rule, "Autograd", with_keyset=True)
        else:
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"ltepass::{name}", _fake(op, with_mask), lib=_library)
        vmap = vmap_over_x(public, _batched_mask) if with_mask else vmap_over_x(public)
        torch.library.register_vmap(f"ltepass::{name}", vmap, lib=_library)


def _register_in_codes(op: RoutedOp) -> None:
    """One op without a gradient: quantised weights are constants, and nothing trains through them yet."""
    _library.define(f"{op.name}{op.arguments} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    public = getattr(torch.ops.ltepass, op.name).default
    _library.impl(op.name, any_device(public, partial(_plain, op, False)), "CompositeExplicitAutograd")
    rule = dispatch.rule(public, dispatch.no_gradient(public, "weights in floats"), "weights in floats")
    _library.impl(op.name, rule, "Autograd", with_keyset=True)
    torch.library.register_fake(f"ltepass::{op.name}", _fake(op, False), lib=_library)
    torch.library.register_vmap(f"ltepass::{op.name}", vmap_over_x(public), lib=_library)


_register(LINEAR)
_register(PROXY)
for _op in IN_CODES:
    _register_in_codes(_op)
dispatch.show_launches(_library)


# As lowered modules call them.
routed_ffn = dispatch.without_a_frame("routed_ffn")
routed_proxy_ffn = dispatch.without_a_frame("routed_proxy_ffn")
