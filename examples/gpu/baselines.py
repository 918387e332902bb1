"""What the routed FFN is compared with, rebuilt from published descriptions; each in the form its authors time.

All work on one token of a gated FFN with silu. `down` has one contiguous row per neuron where a method gathers neurons.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.gpu.programs import jit


def dense(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    """x [T, D] -> [T, D]. Also what `torch.compile(mode="max-autotune")` gets."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@jit
def atomics_kernel(x, up, gate, down, neurons, y, n_active, d_model, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some active neurons: their hidden units, then their share of y, added in no fixed order."""
    place_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_N = place_N < n_active
    row_N = tl.load(neurons + place_N, mask=live_N, other=0).to(tl.int64)
    up_N = tl.zeros([BLOCK_N], tl.float32)
    gate_N = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, d_model, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        live_ND = live_N[:, None] & (col_D < d_model)[None, :]
        at_ND = row_N[:, None] * d_model + col_D[None, :]
        x_D = tl.load(x + col_D, mask=col_D < d_model, other=0.0).to(tl.float32)
        up_N += tl.sum(tl.load(up + at_ND, mask=live_ND, other=0.0).to(tl.float32) * x_D[None, :], axis=1)
        gate_N += tl.sum(tl.load(gate + at_ND, mask=live_ND, other=0.0).to(tl.float32) * x_D[None, :], axis=1)
    h_N = gate_N * tl.sigmoid(gate_N) * up_N
    for start in range(0, d_model, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        live_ND = live_N[:, None] & (col_D < d_model)[None, :]
        w_ND = tl.load(down + row_N[:, None] * d_model + col_D[None, :], mask=live_ND, other=0.0).to(tl.float32)
        tl.atomic_add(y + col_D, tl.sum(w_ND * h_N[:, None], axis=0), mask=col_D < d_model)


def paper_atomics(x: Tensor, router: Tensor, up: Tensor, gate: Tensor, down_by_neuron: Tensor) -> Tensor:
    """The LTE paper's kernel (section 5.3): indices on the host, gathered neurons, atomic adds. x: [1, D]."""
    active = (F.linear(x.float(), router)[0] > 0).nonzero()  # waits for the device
    group_size = up.shape[0] // router.shape[0]
    neurons = (active * group_size + torch.arange(group_size, device=x.device)).flatten().int()
    y = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    grid = (max(triton.cdiv(neurons.numel(), 16), 1),)
    sizes = (neurons.numel(), x.shape[1])
    atomics_kernel[grid](x, up, gate, down_by_neuron, neurons, y, *sizes, BLOCK_N=16, BLOCK_D=256)
    return y.to(x.dtype)[None]


@jit
def masked_columns_kernel(
    values, weight, y, threshold, n_in, n_out, PER_SPLIT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr
):
    """y[o] += sum over inputs with |value| > threshold of value * weight[i, o]: skipped inputs' rows are not loaded."""
    out_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    acc_O = tl.zeros([BLOCK_O], tl.float32)
    for step in range(PER_SPLIT):
        in_I = (tl.program_id(1) * PER_SPLIT + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        value_I = tl.load(values + in_I, mask=in_I < n_in, other=0.0).to(tl.float32)
        keep_I = (tl.abs(value_I) > tl.load(threshold)) & (in_I < n_in)
        at_IO = in_I.to(tl.int64)[:, None] * n_out + out_O[None, :]
        w_IO = tl.load(weight + at_IO, mask=keep_I[:, None] & (out_O < n_out)[None, :], other=0.0).to(tl.float32)
        acc_O += tl.sum(w_IO * tl.where(keep_I, value_I, 0.0)[:, None], axis=0)
    tl.atomic_add(y + out_O, acc_O, mask=out_O < n_out)


def masked_columns(values: Tensor, weight_by_input: Tensor, threshold: Tensor) -> Tensor:
    """values [I], weight [I, O], threshold [] fp32 -> fp32 [O]: mask in the load, split over the inputs."""
    n_in, n_out = weight_by_input.shape
    y = torch.zeros(n_out, dtype=torch.float32, device=values.device)
    grid = (triton.cdiv(n_out, 128), triton.cdiv(n_in, 16 * 32))
    blocks = {"PER_SPLIT": 16, "BLOCK_I": 32, "BLOCK_O": 128}
    masked_columns_kernel[grid](values, weight_by_input, y, threshold, n_in, n_out, **blocks)
    return y


def teal(
    x: Tensor, up_by_input: Tensor, gate_by_input: Tensor, down_by_neuron: Tensor, x_limit: Tensor, h_limit: Tensor
) -> Tensor:
    """TEAL (arXiv 2408.14690): every matrix skips inputs of small magnitude, by calibrated thresholds. x: [1, D]."""
    gate, up = masked_columns(x[0], gate_by_input, x_limit), masked_columns(x[0], up_by_input, x_limit)
    h = F.silu(gate) * up
    return masked_columns(h, down_by_neuron, h_limit).to(x.dtype)[None]


@jit
def masked_rows_kernel(x, weight, gate, h, threshold, n_rows, d_model, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """h = silu(gate) * (weight . x), and zero without reading a row where |silu(gate)| is small."""
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_N = tl.load(gate + row_N, mask=row_N < n_rows, other=0.0).to(tl.float32)
    gate_N = gate_N * tl.sigmoid(gate_N)
    keep_N = (tl.abs(gate_N) > tl.load(threshold)) & (row_N < n_rows)
    acc_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, d_model, BLOCK_D):
        col_D = start + tl.arange(0, BLOCK_D)
        live_ND = keep_N[:, None] & (col_D < d_model)[None, :]
        w_ND = tl.load(weight + row_N.to(tl.int64)[:, None] * d_model + col_D[None, :], mask=live_ND, other=0.0)
        x_D = tl.load(x + col_D, mask=col_D < d_model, other=0.0).to(tl.float32)
        acc_ND += w_ND.to(tl.float32) * x_D[None, :]
    h_N = tl.where(keep_N, gate_N * tl.sum(acc_ND, axis=1), 0.0)
    tl.store(h + row_N, h_N, mask=row_N < n_rows)


def cats(x: Tensor, up: Tensor, gate: Tensor, down_by_neuron: Tensor, limit: Tensor) -> Tensor:
    """CATS (arXiv 2404.08763): the gate is dense, and its small activations spare rows of up and of down. x: [1, D]."""
    gated = F.linear(x, gate)
    h = torch.empty(up.shape[0], dtype=torch.float32, device=x.device)
    masked_rows_kernel[(triton.cdiv(up.shape[0], 4),)](x, up, gated, h, limit, *up.shape, BLOCK_N=4, BLOCK_D=512)
    return masked_columns(h, down_by_neuron, torch.zeros_like(limit)).to(x.dtype)[None]
