"""Tiles of weights and tokens, read, and of outputs, written.

Letters at the end of a name are its axes: T tokens, D d_model, E experts, N neurons of one expert, K neurons that an
output sums over, O outputs. Every offset that grows with a weight or with the tokens is int64.
"""

# triton and inductor both evaluate a kernel's annotations, so only tl.constexpr may stand there:
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton.language as tl

from ltepass.kernels.gpu.programs import jit


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
