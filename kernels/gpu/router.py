"""The router's kernels, of one token and of many: which token wants which expert, decided in fp32.

Those of one token read the weight row by row; those of many multiply on matrix units, whatever follows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltepass.kernels.gpu.call import DOT, Call
from ltepass.kernels.gpu.plan import zero_tickets
from ltepass.kernels.gpu.programs import jit, let_next_start, wait_for_previous
from ltepass.kernels.gpu.tiles import input_tile, token_tile, weight_tile


@jit
def router_one(
    x,
    weight,
    bias,
    threshold,
    plan,
    n_experts,
    d_model,
    n_tickets,
    HAS_BIAS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """plan[e] = x . weight[e] + bias[e] > threshold. Grid: (cdiv(E, BLOCK_E),). weight: [E, D] contiguous."""
    wait_for_previous(PDL)  # x may be another kernel's output
    let_next_start(PDL)
    pid = tl.program_id(0)
    expert_E = pid * BLOCK_E + tl.arange(0, BLOCK_E)
    live_E = expert_E < n_experts
    acc_ED = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in tl.range(0, d_model, BLOCK_D, num_stages=STAGES):
        col_D = start + tl.arange(0, BLOCK_D)
        live_ED = live_E[:, None] & (col_D < d_model)[None, :]
        w_ED = weight_tile(weight, expert_E.to(tl.int64), col_D, live_ED, d_model, 1)
        acc_ED = tl.fma(w_ED, input_tile(x, col_D, live_ED), acc_ED)
    logit_E = tl.sum(acc_ED, axis=1)
    if HAS_BIAS:
        logit_E += tl.load(bias + expert_E, mask=live_E, other=0.0)
    tl.store(plan + expert_E, (logit_E > tl.load(threshold)).to(tl.int32), mask=live_E)
    if pid == 0:
        zero_tickets(plan, n_experts, n_tickets)


@jit
def exact_dot(w_ED, x_DT, acc_ET, TF32: tl.constexpr):
    """acc + w . x with w in fp32, to about fp32's own rounding, on the fastest unit that can.

    bf16 x: w as three bf16 parts, 24 bits. fp16 x, which tf32 holds exactly: w as two tf32 parts, 22 bits.
    """
    if x_DT.dtype == tl.bfloat16:
        high_ED = w_ED.to(tl.bfloat16)
        rest_ED = w_ED - high_ED.to(tl.float32)
        middle_ED = rest_ED.to(tl.bfloat16)
        low_ED = (rest_ED - middle_ED.to(tl.float32)).to(tl.bfloat16)
        acc_ET = tl.dot(low_ED, x_DT, acc_ET)
        acc_ET = tl.dot(middle_ED, x_DT, acc_ET)
        acc_ET = tl.dot(high_ED, x_DT, acc_ET)
    elif TF32:
        high_ED = (w_ED.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc_ET = tl.dot(w_ED - high_ED, x_DT.to(tl.float32), acc_ET, input_precision="tf32")
        acc_ET = tl.dot(high_ED, x_DT.to(tl.float32), acc_ET, input_precision="tf32")
    else:
        acc_ET = tl.dot(w_ED, x_DT.to(tl.float32), acc_ET, input_precision="ieee")
    return acc_ET


@jit
def router_many(
    x,
    weight,
    bias,
    threshold,
    mask,
    plan,
    n_tokens,
    n_experts,
    d_model,
    n_tickets,
    HAS_BIAS: tl.constexpr,
    UNION: tl.constexpr,
    TF32: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mask[e, t] = 1 (int8) where token t wants e; with UNION (n_tokens <= BLOCK_T) plan[e] = any.

    Grid: (cdiv(E, EXPERTS), T tiles). EXPERTS may be less than BLOCK_E, the least that matrix units take: with few
    tokens the router is bound by memory, and more programs read faster.
    """
    place_E = tl.arange(0, BLOCK_E)
    expert_E = tl.program_id(0) * EXPERTS + place_E
    token_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live_E, live_T = (place_E < EXPERTS) & (expert_E < n_experts), token_T < n_tokens
    logit_ET = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    for start in range(0, d_model, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        live_D = col_D < d_model
        x_DT = token_tile(x, token_T, live_T, col_D, live_D, d_model)
        at_ED = expert_E.to(tl.int64)[:, None] * d_model + col_D[None, :]
        w_ED = tl.load(weight + at_ED, mask=live_E[:, None] & live_D[None, :], other=0.0)
        logit_ET = exact_dot(w_ED, x_DT, logit_ET, TF32)
    if HAS_BIAS:
        logit_ET += tl.load(bias + expert_E, mask=live_E, other=0.0)[:, None]
    wants_ET = ((logit_ET > tl.load(threshold)) & live_T[None, :]).to(tl.int32)
    at_ET = expert_E.to(tl.int64)[:, None] * n_tokens + token_T[None, :]
    tl.store(mask + at_ET, wants_ET.to(tl.int8), mask=live_E[:, None] & live_T[None, :])
    if UNION:
        tl.store(plan + expert_E, tl.max(wants_ET, axis=1), mask=live_E)
        if tl.program_id(0) == 0:
            zero_tickets(plan, n_experts, n_tickets)


def mask_of(c: Call) -> Tensor:
    """The router of many tokens -> int8 [n_experts, T]."""
    tuned = c.tuned("router_tokens")
    blocks = tuned.fit(DOT, BLOCK_E=c.n_experts, BLOCK_D=c.d_model)
    mask = c.empty(c.n_experts, c.n_tokens, dtype=torch.int8)
    grid = (triton.cdiv(c.n_experts, blocks["EXPERTS"]), triton.cdiv(c.n_tokens, blocks["BLOCK_T"]))
    unused = {"plan": c.x, "n_tickets": 0, "UNION": False}
    c.launch(router_many, tuned, blocks, grid, **c.router_args(), n_tokens=c.n_tokens, mask=mask, **unused)
    return mask
