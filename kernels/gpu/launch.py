"""`ltepass::routed_ffn` on a GPU: chooses a path, allocates, launches. Nothing here waits for the device.

The kernels are in triton_decode (one token), triton_batch (2-32 tokens) and triton_prefill; their tile sizes in
tuning_table.csv. Launches go to the current stream and every buffer is allocated by torch, so a CUDA graph captures a
call as it is. Memory beside the result: h [T, d_ff], the plan, and fp32 parts of y where down is split.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels import reference
from ltepass.kernels.gpu import tuning
from ltepass.kernels.gpu.batch import down_many, gate_up_many, router_many
from ltepass.kernels.gpu.call import Call
from ltepass.kernels.gpu.common import plan_size
from ltepass.kernels.gpu.decode import down_one, gate_up_one, router_one
from ltepass.kernels.gpu.prefill import gate_up_grouped, mask_hidden, partition_tokens

MAX_SPLITS = 32  # parts of y that the last arriver adds: its loads are unrolled, so all of them are in flight at once
DOT = 16  # the smallest side of a tile on matrix units


def routed_ffn(*args: Any) -> Tensor:
    """The op's arguments in the order of its schema; x [..., d_model] -> [..., d_out], on x's GPU and current stream.

    float32, float16 and bfloat16 run on kernels, float64 (gradcheck) runs the definition.
    """
    if args[0].dtype == torch.float64:
        return reference.routed_ffn(*args)
    return _eager(args)[0]


def routed_ffn_with_mask(*args: Any) -> tuple[Tensor, Tensor]:
    """The same, and the decision that the kernels took: bool [..., n_experts]."""
    if args[0].dtype == torch.float64:
        return reference.routed_ffn(*args), reference.mask(*args[:4])
    y, wanted = _eager(args)
    n_experts = args[1].shape[0]
    by_token = wanted[:n_experts].unsqueeze(0) if wanted.dim() == 1 else wanted.t()  # a plan, or a mask
    return y, by_token.bool().reshape(*args[0].shape[:-1], n_experts)


def _eager(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    x = args[0]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return run(Call.of(args, launcher=lambda kernel: kernel), tuning.assumed_density())


def routed_ffn_traceable(*args: Any) -> Tensor:
    """The same for tracers: launches are `torch.library.wrap_triton` nodes, which inductor compiles with the rest."""
    if args[0].dtype == torch.float64:
        return reference.routed_ffn(*args)
    return run(Call.of(args, launcher=torch.library.wrap_triton), tuning.assumed_density())[0]


def run(c: Call, density: float | None) -> tuple[Tensor, Tensor]:
    """With any launcher: the eager one, a tracer's, the recorder of the ahead-of-time table.

    -> y, and what says which token wants which expert: a plan (of one token) or a mask [n_experts, T].
    """
    if c.n_tokens == 0:
        return c.empty(*c.leading, c.d_out), c.empty(c.n_experts, 0, dtype=torch.int8)
    path = tuning.choose_path(c.n_tokens, density, c.tuned("paths"))
    # The op's dtype is x's: autocast would change that of the dense products inside it.
    with torch.autocast("cuda", enabled=False) if torch.is_autocast_enabled("cuda") else nullcontext():
        y, wanted = {"one": one, "union": union, "grouped": grouped, "dense": dense}[path](c)
    return y.reshape(*c.leading, c.d_out), wanted


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


def mask_of(c: Call) -> Tensor:
    """The router of many tokens -> int8 [n_experts, T]."""
    tuned = c.tuned("router_tokens")
    blocks = tuned.fit(DOT, BLOCK_E=c.n_experts, BLOCK_D=c.d_model)
    mask = c.empty(c.n_experts, c.n_tokens, dtype=torch.int8)
    grid = (triton.cdiv(c.n_experts, blocks["EXPERTS"]), triton.cdiv(c.n_tokens, blocks["BLOCK_T"]))
    unused = {"plan": c.x, "n_tickets": 0, "UNION": False}
    c.launch(router_many, tuned, blocks, grid, **c.router_args(), n_tokens=c.n_tokens, mask=mask, **unused)
    return mask


def split(c: Call, blocks: dict[str, int]) -> tuple[int, int]:
    """-> (output tiles, splits of the list of active neurons), for about PROGRAMS programs in all."""
    n_tiles = triton.cdiv(c.d_out, blocks["BLOCK_O"])
    wanted = min(blocks.pop("PROGRAMS") // n_tiles, c.n_experts, MAX_SPLITS)
    return n_tiles, 1 << (max(wanted, 1).bit_length() - 1)


def parts_of(c: Call, splits: int, unused: Tensor) -> Tensor:
    """fp32 room for each split's part of y; a pointer that is never followed where there is one split."""
    return c.empty(splits, c.n_tokens, c.d_out, dtype=torch.float32) if splits > 1 else unused
