"""The same three launches for 2 to 32 tokens, on matrix units; the router is `router.router_many`.

A weight row is read once when any token of the call wants its expert (the union); each token's own mask decides what is
kept of the result, so a token computes what it would compute alone. Weights are the left operand: a tile has as many
rows as neurons (or outputs) and as many columns as tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltepass.kernels.gpu.call import DOT, Call, parts_of, split
from ltepass.kernels.gpu.hidden_units import hidden_units
from ltepass.kernels.gpu.plan import chunk_neurons, list_expert, my_chunks, plan_size
from ltepass.kernels.gpu.programs import jit
from ltepass.kernels.gpu.router import router_many
from ltepass.kernels.gpu.tiles import finish_tile, token_tile


@jit
def gate_up_many(
    x,
    up,
    up_bias,
    gate,
    gate_bias,
    cut,
    mask,
    plan,
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
    """h[t, n] in x's dtype for the neurons of the union's experts, 0 where token t does not want the expert.

    Grid: (E + E * cdiv(GROUP, BLOCK_N),), the first E programs make the list; n_tokens <= BLOCK_T.
    """
    parts: tl.constexpr = (GROUP + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert = (pid - n_experts) // parts
    if pid < n_experts:
        list_expert(plan, pid, n_experts)
    elif tl.load(plan + expert) != 0:
        token_T = tl.arange(0, BLOCK_T)
        live_T = token_T < n_tokens
        place_N = (pid - n_experts) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
        live_N = place_N < GROUP
        row_N = expert.to(tl.int64) * GROUP + place_N
        up_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        gate_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for start in range(0, d_model, BLOCK_D):
            col_D = start + tl.arange(0, BLOCK_D)
            live_D = col_D < d_model
            live_ND = live_N[:, None] & live_D[None, :]
            x_DT = token_tile(x, token_T, live_T, col_D, live_D, d_model)
            up_at_ND = row_N[:, None] * stride_un + col_D.to(tl.int64)[None, :] * stride_ud
            up_ND = tl.load(up + up_at_ND, mask=live_ND, other=0.0, eviction_policy="evict_first")
            up_NT = tl.dot(up_ND, x_DT, up_NT, input_precision="ieee")
            if GATED:
                gate_at_ND = row_N[:, None] * stride_gn + col_D.to(tl.int64)[None, :] * stride_gd
                gate_ND = tl.load(gate + gate_at_ND, mask=live_ND, other=0.0, eviction_policy="evict_first")
                gate_NT = tl.dot(gate_ND, x_DT, gate_NT, input_precision="ieee")
        if HAS_UP_BIAS:
            up_NT += tl.load(up_bias + row_N, mask=live_N, other=0.0).to(tl.float32)[:, None]
        if HAS_GATE_BIAS:
            gate_NT += tl.load(gate_bias + row_N, mask=live_N, other=0.0).to(tl.float32)[:, None]
        wants_T = tl.load(mask + expert.to(tl.int64) * n_tokens + token_T, mask=live_T, other=0)
        h_NT = tl.where(wants_T[None, :] != 0, hidden_units(up_NT, gate_NT, cut, ACT, GATED, HAS_CUT), 0.0)
        at_NT = token_T.to(tl.int64)[None, :] * (n_experts * GROUP) + row_N[:, None]
        tl.store(h + at_NT, h_NT.to(h.dtype.element_ty), mask=live_N[:, None] & live_T[None, :])


@jit
def down_many(
    h,
    down,
    bias,
    plan,
    partial,
    y,
    n_tokens,
    n_experts,
    d_out,
    stride_do,
    stride_dn,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[t] = down[:, union] . h[t, union] + bias. Grid: (cdiv(d_out, BLOCK_O), SPLITS); n_tokens <= BLOCK_T."""
    tile, split = tl.program_id(0), tl.program_id(1)
    token_T = tl.arange(0, BLOCK_T)
    live_T = token_T < n_tokens
    out_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    live_O = out_O < d_out
    parts: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    first, end = my_chunks(plan, n_experts, split, parts, SPLITS)
    acc_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for chunk in range(first, end):
        neuron_K, live_K = chunk_neurons(plan, n_experts, chunk, parts, GROUP, BLOCK_K)
        h_at_KT = token_T.to(tl.int64)[None, :] * (n_experts * GROUP) + neuron_K[:, None]
        h_KT = tl.load(h + h_at_KT, mask=live_K[:, None] & live_T[None, :], other=0.0)
        at_OK = out_O.to(tl.int64)[:, None] * stride_do + neuron_K[None, :] * stride_dn
        live_OK = live_O[:, None] & live_K[None, :]
        w_OK = tl.load(down + at_OK, mask=live_OK, other=0.0, eviction_policy="evict_first")
        acc_OT = tl.dot(w_OK, h_KT, acc_OT, input_precision="ieee")
    bias_O = tl.zeros([BLOCK_O], tl.float32)
    if HAS_BIAS:
        bias_O = tl.load(bias + out_O, mask=live_O, other=0.0).to(tl.float32)
    size = tl.cast(n_tokens, tl.int64) * d_out  # torch 2.11 reads this with a plain int
    where_OT = token_T.to(tl.int64)[None, :] * d_out + out_O[:, None]
    live_OT = live_O[:, None] & live_T[None, :]
    ticket = plan + 2 * n_experts + 1 + tile
    finish_tile(acc_OT, bias_O[:, None], partial, y, where_OT, live_OT, size, ticket, split, SPLITS)


def union(c: Call) -> tuple[Tensor, Tensor]:
    """2-32 tokens in three launches: an expert's bytes are read once if any token wants it."""
    router, gate_up, down = c.tuned("router_many"), c.tuned("gate_up_many"), c.tuned("down_many" + c.layout)
    r = router.fit(DOT, BLOCK_E=c.n_experts, BLOCK_D=c.d_model)
    g = gate_up.fit(DOT, BLOCK_N=c.group_size, BLOCK_D=c.d_model)
    d = down.fit(DOT, BLOCK_O=c.d_out, BLOCK_K=c.group_size)
    n_tiles, splits = split(c, d)
    plan = c.empty(plan_size(c.n_experts, n_tiles), dtype=torch.int32)
    mask = c.empty(c.n_experts, c.n_tokens, dtype=torch.int8)
    h = c.empty(c.n_tokens, c.d_ff)
    y = c.empty(c.n_tokens, c.d_out)
    tokens = {"n_tokens": c.n_tokens, "BLOCK_T": DOT if c.n_tokens <= DOT else 2 * DOT}
    grid: tuple[int, ...] = (triton.cdiv(c.n_experts, r["EXPERTS"]), 1)
    more = {"mask": mask, "plan": plan, "n_tickets": n_tiles, "UNION": True}
    c.launch(router_many, router, r, grid, **c.router_args(), **tokens, **more)
    grid = (c.n_experts * (1 + triton.cdiv(c.group_size, g["BLOCK_N"])),)
    c.launch(gate_up_many, gate_up, g, grid, **c.gate_up_args(), **tokens, mask=mask, plan=plan, h=h)
    outputs = {"h": h, "plan": plan, "partial": parts_of(c, splits, h), "y": y, "SPLITS": splits}
    c.launch(down_many, down, d, (n_tiles, splits), **c.down_args(), **tokens, **outputs)
    return y, mask
