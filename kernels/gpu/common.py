"""What the Triton kernels share: the activations, and how active experts are listed without a host sync.

Letters at the end of a name are its axes: T tokens, D d_model, E experts, N neurons of one expert, K neurons that an
output sums over, O outputs. Every offset that grows with a weight or with the tokens is int64.

The plan is one int32 buffer, written and read on the device only, never by the host:
    plan[0 : E]       1 where some token of the call wants the expert (written by the router kernel)
    plan[E : 2 E]     the active experts in ascending order (written by the gate/up kernel)
    plan[2 E]         their count
    plan[2 E + 1 :]   one ticket for each output tile of the down kernel (zeroed by the router kernel)
An expert's place in the list is the number of active experts before it, so a program of its own finds it by a sum: no
atomics, no state that outlives a call (two streams never meet), and the same order on every run.
"""

# triton and inductor both evaluate a kernel's annotations, so only tl.constexpr may stand there:
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Typed, so that mypy --strict accepts what it decorates; the result is triton's own JITFunction.
jit: Callable[[Callable[..., Any]], Any] = triton.jit


def plan_size(n_experts: int, n_tiles: int) -> int:
    """Elements of the plan for `n_experts` experts and `n_tiles` output tiles."""
    return 2 * n_experts + 1 + n_tiles


@jit
def activate(v, ACT: tl.constexpr):
    """v: fp32, any shape. relu keeps NaN, as torch does; v (1 + tanh u) / 2 = v sigmoid(2 u) in gelu_tanh."""
    if ACT == "silu":
        out = v * tl.sigmoid(v)
    elif ACT == "gelu":
        out = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        out = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == "quick_gelu":
        out = v * tl.sigmoid(1.702 * v)
    elif ACT == "relu":
        out = tl.where(v < 0, 0.0, v)
    elif ACT == "relu2":
        out = tl.where(v < 0, 0.0, v * v)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        out = v
    return out


@jit
def hidden_units(up, gate, cut, ACT: tl.constexpr, GATED: tl.constexpr, HAS_CUT: tl.constexpr):
    """fp32 sums of the two linears -> hidden units, still fp32: rounding happens once, when they are stored.

    Units of a size up to the cut are 0; NaN is not small.
    """
    out = activate(gate if GATED else up, ACT)
    if GATED:
        out *= up
    if HAS_CUT:
        out = tl.where(tl.abs(out) <= tl.load(cut), 0.0, out)
    return out


@jit
def wait_for_previous(PDL: tl.constexpr):
    """First statement of a kernel that may start while the one before it still runs (Hopper and later)."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs take the places that this one's leave free, and wait there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def zero_tickets(plan, n_experts, n_tickets):
    """By one program of the router kernel, so that the down kernel needs no memset and no persistent buffer."""
    for start in range(0, n_tickets, 128):
        ticket = start + tl.arange(0, 128)
        tl.store(plan + 2 * n_experts + 1 + ticket, tl.zeros([128], tl.int32), mask=ticket < n_tickets)


@jit
def list_expert(plan, expert, n_experts):
    """Puts `expert` in its place of the list if it is active; the last expert's program also writes the count."""
    flag = tl.load(plan + expert)
    last = expert == n_experts - 1
    if (flag != 0) | last:
        before_E = tl.zeros([512], tl.int32)
        for start in range(0, expert, 512):
            other = start + tl.arange(0, 512)
            before_E += tl.load(plan + other, mask=other < expert, other=0)
        rank = tl.sum(before_E, axis=0)
        if flag != 0:
            tl.store(plan + n_experts + rank, expert)
        if last:
            tl.store(plan + 2 * n_experts, rank + flag)


@jit
def my_chunks(plan, n_experts, split, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """-> (first, end): this split's share of the list of active experts, each taken in PARTS chunks of neurons."""
    n_chunks = tl.load(plan + 2 * n_experts) * PARTS
    return split * n_chunks // SPLITS, (split + 1) * n_chunks // SPLITS


@jit
def chunk_neurons(plan, n_experts, chunk, PARTS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """-> (neuron numbers int64 [K], which of them are the expert's). One scalar read of the list serves a tile."""
    expert = tl.load(plan + n_experts + chunk // PARTS).to(tl.int64)
    place_K = chunk % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
    return expert * GROUP + place_K, place_K < GROUP


@jit
def finish_tile(acc, bias, partial, y, where, live, size, ticket, split, SPLITS: tl.constexpr):
    """Writes an output tile whose sum is spread over SPLITS programs; whoever comes last adds all parts in fixed order.

    where: offsets into y; size: elements of y, which is also the distance between two splits' parts in `partial`.
    """
    if SPLITS == 1:
        tl.store(y + where, (acc + bias).to(y.dtype.element_ty), mask=live)
    else:
        tl.store(partial + split * size + where, acc, mask=live)
        tl.debug_barrier()  # every thread's part is stored before one of them takes the ticket
        if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros_like(acc)
            for s in tl.static_range(SPLITS):
                # .cg: another multiprocessor wrote it, so not from this one's L1
                total += tl.load(partial + s * size + where, mask=live, other=0.0, cache_modifier=".cg")
            tl.store(y + where, (total + bias).to(y.dtype.element_ty), mask=live)


@jit
def weight_tile(weight, row_N, col_D, live_ND, stride_n, stride_d):
    """fp32 [N, D] of a weight that no other program of the launch reads: evict_first leaves L2 to x, h and the plan."""
    at_ND = row_N[:, None] * stride_n + col_D.to(tl.int64)[None, :] * stride_d
    return tl.load(weight + at_ND, mask=live_ND, other=0.0, eviction_policy="evict_first").to(tl.float32)


@jit
def input_tile(x, col_D, live_ND):
    """x, fp32, once for each row: every thread loads what it multiplies. One row would go through shared memory."""
    at_ND = tl.broadcast_to(col_D[None, :], live_ND.shape)
    return tl.load(x + at_ND, mask=live_ND, other=0.0).to(tl.float32)


@jit
def token_tile(x, token_T, live_T, col_D, live_D, d_model):
    """x^T as [D, T], in x's dtype; x: [T, D] contiguous."""
    at_DT = token_T.to(tl.int64)[None, :] * d_model + col_D[:, None]
    return tl.load(x + at_DT, mask=live_D[:, None] & live_T[None, :], other=0.0)
