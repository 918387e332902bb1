"""The gate of one FFN site: what applies its router's decision.

Paper section 4.2: soft y = sum_i G_i E_i(x); hard y = sum_i 1[G_i > tau] E_i(x), unscaled.
The gate multiplies the FFN's hidden units just before the down projection, which is the same sum. Where inactive
neurons keep low bits, it lets none through, so that down gives its bias alone; `add_tiers` adds the rest.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltepass.errors import ShardedError
from ltepass.kernels.reference import leave_out_small
from ltepass.threads import require_own

if TYPE_CHECKING:
    from ltepass.routed.router import Router

calls = threading.local()  # gates: how many a watched router's gates were, in the guarded call that runs now


def applied() -> None:
    """A watched router's gate was applied, or the op that stands for it."""
    calls.gates = getattr(calls, "gates", 0) + 1


_library = torch.library.Library("ltepass", "FRAGMENT")
_library.define("gate(Tensor h, Tensor logits, Tensor threshold, bool soft, Tensor? cut=None) -> Tensor")


def _gate(h: Tensor, logits: Tensor, threshold: Tensor, soft: bool, cut: Tensor | None = None) -> Tensor:
    scores = torch.sigmoid(logits) if soft else logits > threshold
    n_experts = logits.shape[-1]
    gated: Tensor = h.unflatten(-1, (n_experts, -1)) * scores.to(h.dtype).unsqueeze(-1)
    return leave_out_small(gated.flatten(-2), None if soft else cut)


def _straight_through(h: Tensor, logits: Tensor, threshold: Tensor, cut: Tensor | None) -> Tensor:
    """The hard gate's value, with the gradient of a sigmoid around the threshold."""
    mask = straight_through(logits, threshold)
    gated: Tensor = h.unflatten(-1, (logits.shape[-1], -1)) * mask.to(h.dtype).unsqueeze(-1)
    return leave_out_small(gated.flatten(-2), cut)


def straight_through(logits: Tensor, threshold: Tensor) -> Tensor:
    """The hard decision, 0 or 1 in the logits' dtype, with that gradient."""
    scores = torch.sigmoid(logits - threshold)
    return (logits > threshold).to(scores.dtype) + (scores - scores.detach())


# One op in Dynamo's graph, so that a pass finds it without guessing; plain ATen ops for autograd, export and inductor.
_library.impl("gate", _gate, "CompositeImplicitAutograd")
_library.define("cut_inputs(Tensor x, Tensor cut) -> Tensor")
_library.impl("cut_inputs", leave_out_small, "CompositeImplicitAutograd")


def seen_inputs(router: Router, x: Tensor) -> Tensor:
    """x: [..., d_model] -> what up and gate see of it: all, or in hard mode what `input_cut` leaves."""
    if isinstance(x, torch.fx.Proxy):
        return x.tracer.create_proxy("call_function", seen_inputs, (router, x), {})
    if router.input_cut is None or router.mode != "hard":
        return x
    return torch.ops.ltepass.cut_inputs.default(x, router.input_cut)  # type: ignore[no-any-return]


def gate(router: Router, h: Tensor, logits: Tensor | None) -> Tensor:
    """h: [..., d_ff]; logits: what `router(x)` returned. The definition of soft, hard and dense mode."""
    if isinstance(h, torch.fx.Proxy):  # a GraphModule is traced again when it is pickled: one node stays one node
        return h.tracer.create_proxy("call_function", gate, (router, h, logits), {})
    soft = router.mode == "soft"
    require_own(router)
    if router.observer is not None:
        router.observer(h)
    if router.watched:
        applied()
    if logits is None:
        return h
    if h.shape[-1] != router.d_ff:
        raise ShardedError(
            f"a gate got {h.shape[-1]} of its FFN's {router.d_ff} hidden units; expected all of them on every device: "
            "tensor parallelism cuts experts apart; load the model without tp_plan"
        )
    if router.tiered:
        return torch.zeros_like(h)  # `add_tiers` adds what they write
    if router.straight_through and router.mode == "hard" and torch.is_grad_enabled():
        return _straight_through(h, logits, router.threshold, router.cut)
    cut = () if router.cut is None else (router.cut,)
    return torch.ops.ltepass.gate.default(h, logits, router.threshold, soft, *cut)  # type: ignore[no-any-return]


def add_tiers(router: Router, y: Tensor, logits: Tensor | None, x: Tensor) -> Tensor:
    """y: [..., d_model], what down gave; x: the router's input -> y and what the tiers of bits write."""
    if isinstance(y, torch.fx.Proxy):
        return y.tracer.create_proxy("call_function", add_tiers, (router, y, logits, x), {})
    if logits is None:
        return y
    return y + router.from_planes(x, logits).to(y.dtype)  # type: ignore[operator, no-any-return]
