"""More than 32 tokens: gate/up as one matrix product per expert over the tokens that want it, or dense with a mask.

The router is `router.router_many`. Down is a dense product of h, zeros and all, by whatever library multiplies
matrices best: tokens of a prompt want different experts, so no tile of h is empty.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.gpu.call import DOT, Call
from ltepass.kernels.gpu.hidden_units import hidden_units
from ltepass.kernels.gpu.programs import jit
from ltepass.kernels.gpu.router import mask_of


@jit
def partition_tokens(mask, tokens, counts, n_tokens, BLOCK_T: tl.constexpr):
    """tokens[e]: the tokens that want expert e in ascending order, then those that do not; counts[e]. Grid: (E,).

    The second part lets the next kernel write every element of h exactly once, so h needs no zero fill.
    """
    expert = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], tl.int32)
    for start in range(0, n_tokens, BLOCK_T):
        token_T = start + tl.arange(0, BLOCK_T)
        live_T = token_T < n_tokens
        wants_T = tl.load(mask + expert * n_tokens + token_T, mask=live_T, other=0).to(tl.int32)
        before_T = count + tl.cumsum(wants_T, axis=0) - wants_T
        place_T = tl.where(wants_T != 0, before_T, n_tokens - 1 - (token_T - before_T))
        tl.store(tokens + expert * n_tokens + place_T, token_T, mask=live_T)
        count += tl.sum(wants_T, axis=0)
    tl.store(counts + expert, count)


@jit
def gate_up_grouped(
    x,
    up,
    up_bias,
    gate,
    gate_bias,
    cut,
    tokens,
    counts,
    h,
    n_tokens,
    n_experts,
    d_model,
    stride_un,
    stride_ud,
    stride_gn,
    stride_gd,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_CUT: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h[t, n] in x's dtype, all of it: computed where token t wants the expert, else 0.

    Grid: (E * cdiv(GROUP, BLOCK_N) * cdiv(T, BLOCK_T),); tiles of tokens run fastest, so neighbours share weights.
    """
    parts: tl.constexpr = (GROUP + BLOCK_N - 1) // BLOCK_N
    n_tiles = tl.cdiv(n_tokens, BLOCK_T)
    slice_of_neurons = tl.program_id(0) // n_tiles
    expert = (slice_of_neurons // parts).to(tl.int64)
    place_N = slice_of_neurons % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    live_N = place_N < GROUP
    row_N = expert * GROUP + place_N
    first = tl.program_id(0) % n_tiles * BLOCK_T
    place_T = first + tl.arange(0, BLOCK_T)
    live_T = place_T < n_tokens
    count = tl.load(counts + expert)
    token_T = tl.load(tokens + expert * n_tokens + place_T, mask=live_T, other=0).to(tl.int64)
    wants_T = place_T < count
    up_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    gate_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, tl.where(first < count, d_model, 0), BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        live_D = col_D < d_model
        live_DN = live_D[:, None] & live_N[None, :]
        x_at_TD = token_T[:, None] * d_model + col_D[None, :]
        x_TD = tl.load(x + x_at_TD, mask=wants_T[:, None] & live_D[None, :], other=0.0)
        up_at_DN = row_N[None, :] * stride_un + col_D.to(tl.int64)[:, None] * stride_ud
        up_TN = tl.dot(x_TD, tl.load(up + up_at_DN, mask=live_DN, other=0.0), up_TN, input_precision="ieee")
        if GATED:
            gate_at_DN = row_N[None, :] * stride_gn + col_D.to(tl.int64)[:, None] * stride_gd
            gate_TN = tl.dot(x_TD, tl.load(gate + gate_at_DN, mask=live_DN, other=0.0), gate_TN, input_precision="ieee")
    if HAS_UP_BIAS:
        up_TN += tl.load(up_bias + row_N, mask=live_N, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE_BIAS:
        gate_TN += tl.load(gate_bias + row_N, mask=live_N, other=0.0).to(tl.float32)[None, :]
    h_TN = tl.where(wants_T[:, None], hidden_units(up_TN, gate_TN, cut, ACT, GATED, HAS_CUT), 0.0)
    at_TN = token_T[:, None] * (n_experts * GROUP) + row_N[None, :]
    tl.store(h + at_TN, h_TN.to(h.dtype.element_ty), mask=live_T[:, None] & live_N[None, :])


@jit
def mask_hidden(
    up,
    gate,
    cut,
    mask,
    h,
    n_tokens,
    d_ff,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_CUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h = act(gate) * up * mask; up, gate, h: [T, d_ff] contiguous. Grid: (cdiv(T, BLOCK_T), cdiv(d_ff, BLOCK_N))."""
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    neuron_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_TN = (token_T < n_tokens)[:, None] & (neuron_N < d_ff)[None, :]
    at_TN = token_T.to(tl.int64)[:, None] * d_ff + neuron_N[None, :]
    up_TN = tl.load(up + at_TN, mask=live_TN, other=0.0).to(tl.float32)
    gate_TN = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if GATED:
        gate_TN = tl.load(gate + at_TN, mask=live_TN, other=0.0).to(tl.float32)
    mask_at_TN = (neuron_N // GROUP).to(tl.int64)[None, :] * n_tokens + token_T[:, None]
    wants_TN = tl.load(mask + mask_at_TN, mask=live_TN, other=0) != 0
    h_TN = tl.where(wants_TN, hidden_units(up_TN, gate_TN, cut, ACT, GATED, HAS_CUT), 0.0)
    tl.store(h + at_TN, h_TN.to(h.dtype.element_ty), mask=live_TN)


def grouped(c: Call) -> tuple[Tensor, Tensor]:
    """Many tokens: gate and up are computed only for the (token, expert) pairs that are active; down is dense."""
    partition, gate_up = c.tuned("partition_tokens"), c.tuned("gate_up_grouped")
    g = gate_up.fit(DOT, BLOCK_N=c.group_size, BLOCK_D=c.d_model)
    mask = mask_of(c)
    tokens = c.empty(c.n_experts, c.n_tokens, dtype=torch.int32)
    counts = c.empty(c.n_experts, dtype=torch.int32)
    h = c.empty(c.n_tokens, c.d_ff)
    lists = {"tokens": tokens, "counts": counts, "n_tokens": c.n_tokens}
    c.launch(partition_tokens, partition, partition.blocks, (c.n_experts,), mask=mask, **lists)
    grid = (c.n_experts * triton.cdiv(c.group_size, g["BLOCK_N"]) * triton.cdiv(c.n_tokens, g["BLOCK_T"]),)
    c.launch(gate_up_grouped, gate_up, g, grid, **c.gate_up_args(), **lists, h=h)
    return F.linear(h, c.down, c.down_bias), mask


def dense(c: Call) -> tuple[Tensor, Tensor]:
    """Dense products by the library, activation and mask in one kernel: the exact fallback at high density."""
    tuned = c.tuned("mask_hidden")
    blocks = tuned.fit(BLOCK_N=c.d_ff)
    up = F.linear(c.x, c.up, c.up_bias)
    gate = up if c.gate is None else F.linear(c.x, c.gate, c.gate_bias)
    h = c.empty(c.n_tokens, c.d_ff)
    grid = (triton.cdiv(c.n_tokens, blocks["BLOCK_T"]), triton.cdiv(c.d_ff, blocks["BLOCK_N"]))
    sizes = {"n_tokens": c.n_tokens, "d_ff": c.d_ff}
    mask = mask_of(c)
    constants = {"GROUP": c.group_size, "ACT": c.activation, "GATED": c.gate is not None}
    c.launch(mask_hidden, tuned, blocks, grid, up=up, gate=gate, mask=mask, h=h, **c.cut_args(), **sizes, **constants)
    return F.linear(h, c.down, c.down_bias), mask
