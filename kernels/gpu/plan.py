"""How active experts are listed without a host sync.

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

import triton.language as tl

from ltepass.kernels.gpu.programs import jit


def plan_size(n_experts: int, n_tiles: int) -> int:
    """Elements of the plan for `n_experts` experts and `n_tiles` output tiles."""
    return 2 * n_experts + 1 + n_tiles


@jit
def zero_tickets(plan, n_experts, n_tickets):
    """The plan's tickets, by one program of the router kernel: the down kernel needs no memset and no persistent
    buffer.
    """
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
