"""The three launches of one token: router, gate/up/activation, down. Each reads only what the active experts need.

One token is bound by memory, so everything is a row-wise product with one fp32 accumulator per element of a tile and a
single reduction at the end (by tl.fma: triton 3.10 no longer fuses by itself). The gate/up grid has a program for each
few neurons of EVERY expert; one whose expert is inactive ends after one load, so the hardware's scheduler does what a
compacted grid would do. Only the down kernel, where one output needs all active neurons, reads the list.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltepass.kernels.gpu.call import Call, parts_of, split
from ltepass.kernels.gpu.hidden_units import hidden_units
from ltepass.kernels.gpu.plan import chunk_neurons, list_expert, my_chunks, plan_size
from ltepass.kernels.gpu.programs import jit, let_next_start, wait_for_previous
from ltepass.kernels.gpu.router import router_one
from ltepass.kernels.gpu.tiles import finish_tile, input_tile, weight_tile


@jit
def gate_up_one(
    x,
    up,
    up_bias,
    gate,
    gate_bias,
    cut,
    plan,
    h,
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[n] fp32 for the neurons of active experts; the rest of h stays unwritten. The first E programs make the list.

    Grid: (E + E * cdiv(GROUP, BLOCK_N),).
    """
    wait_for_previous(PDL)
    let_next_start(PDL)
    parts: tl.constexpr = (GROUP + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert = (pid - n_experts) // parts
    if pid < n_experts:
        list_expert(plan, pid, n_experts)
    elif tl.load(plan + expert) != 0:
        place_N = (pid - n_experts) % parts * BLOCK_N + tl.arange(0, BLOCK_N)
        live_N = place_N < GROUP
        row_N = expert.to(tl.int64) * GROUP + place_N
        up_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        gate_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for start in tl.range(0, d_model, BLOCK_D, num_stages=STAGES):
            col_D = start + tl.arange(0, BLOCK_D)
            live_ND = live_N[:, None] & (col_D < d_model)[None, :]
            x_ND = input_tile(x, col_D, live_ND)
            up_ND = tl.fma(weight_tile(up, row_N, col_D, live_ND, stride_un, stride_ud), x_ND, up_ND)
            if GATED:
                gate_ND = tl.fma(weight_tile(gate, row_N, col_D, live_ND, stride_gn, stride_gd), x_ND, gate_ND)
        up_N = tl.sum(up_ND, axis=1)
        gate_N = tl.sum(gate_ND, axis=1)
        if HAS_UP_BIAS:
            up_N += tl.load(up_bias + row_N, mask=live_N, other=0.0).to(tl.float32)
        if HAS_GATE_BIAS:
            gate_N += tl.load(gate_bias + row_N, mask=live_N, other=0.0).to(tl.float32)
        tl.store(h + row_N, hidden_units(up_N, gate_N, cut, ACT, GATED, HAS_CUT).to(h.dtype.element_ty), mask=live_N)


@jit
def down_one(
    h,
    down,
    bias,
    plan,
    partial,
    y,
    n_experts,
    d_out,
    stride_do,
    stride_dn,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = down[:, active] . h[active] + bias. Grid: (cdiv(d_out, BLOCK_O), SPLITS). Either stride of down may be 1.

    With a cut, weights of units that are 0 are not read: bytes saved where a neuron's weights lie side by side.
    """
    wait_for_previous(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    out_O = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    live_O = out_O < d_out
    parts: tl.constexpr = (GROUP + BLOCK_K - 1) // BLOCK_K
    first, end = my_chunks(plan, n_experts, split, parts, SPLITS)
    acc_OK = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    for chunk in tl.range(first, end, num_stages=STAGES):
        neuron_K, live_K = chunk_neurons(plan, n_experts, chunk, parts, GROUP, BLOCK_K)
        h_K = tl.load(h + neuron_K, mask=live_K, other=0.0).to(tl.float32)
        if HAS_CUT:
            live_K &= h_K != 0
        at_OK = out_O.to(tl.int64)[:, None] * stride_do + neuron_K[None, :] * stride_dn
        live_OK = live_O[:, None] & live_K[None, :]
        w_OK = tl.load(down + at_OK, mask=live_OK, other=0.0, eviction_policy="evict_first")
        acc_OK = tl.fma(w_OK.to(tl.float32), tl.broadcast_to(h_K[None, :], w_OK.shape), acc_OK)
    acc_O = tl.sum(acc_OK, axis=1)
    bias_O = tl.zeros([BLOCK_O], tl.float32)
    if HAS_BIAS:
        bias_O = tl.load(bias + out_O, mask=live_O, other=0.0).to(tl.float32)
    ticket = plan + 2 * n_experts + 1 + tile
    finish_tile(acc_O, bias_O, partial, y, out_O, live_O, d_out, ticket, split, SPLITS)


def one(c: Call) -> tuple[Tensor, Tensor]:
    """One token in three launches, each bound by the bytes of the active experts."""
    router, gate_up, down = c.tuned("router_one"), c.tuned("gate_up_one"), c.tuned("down_one" + c.layout)
    r = router.fit(BLOCK_E=c.n_experts, BLOCK_D=c.d_model)
    g = gate_up.fit(BLOCK_N=c.group_size, BLOCK_D=c.d_model)
    d = down.fit(BLOCK_O=c.d_out, BLOCK_K=c.group_size)
    n_tiles, splits = split(c, d)
    plan = c.empty(plan_size(c.n_experts, n_tiles), dtype=torch.int32)
    h = c.empty(c.d_ff, dtype=torch.float32)
    y = c.empty(1, c.d_out)
    grid: tuple[int, ...] = (triton.cdiv(c.n_experts, r["BLOCK_E"]),)
    c.launch(router_one, router, r, grid, **c.router_args(), plan=plan, n_tickets=n_tiles)
    grid = (c.n_experts * (1 + triton.cdiv(c.group_size, g["BLOCK_N"])),)
    c.launch(gate_up_one, gate_up, g, grid, **c.gate_up_args(), plan=plan, h=h)
    outputs = {"h": h, "plan": plan, "partial": parts_of(c, splits, h), "y": y, "SPLITS": splits}
    c.launch(down_one, down, d, (n_tiles, splits), **c.down_args(), HAS_CUT=c.cut is not None, **outputs)
    return y, plan
