"""`ltepass::routed_ffn` on a GPU: on the path that which_path.py chooses. Nothing here waits for the device.

The kernels and what launches them are in router.py, decode.py (one token), batch.py (2-32 tokens) and prefill.py; their
tile sizes in tuning_table.csv. Launches go to the current stream and every buffer is allocated by torch, so a CUDA
graph captures a call as it is. Memory beside the result: h [T, d_ff], the plan, and fp32 parts of y where down is
split.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import reference
from ltepass.kernels.gpu import which_path
from ltepass.kernels.gpu.batch import union
from ltepass.kernels.gpu.call import Call
from ltepass.kernels.gpu.decode import one
from ltepass.kernels.gpu.prefill import dense, grouped


def routed_ffn(*args: Any) -> Tensor:
    """The op's arguments in the order of its schema; x [..., d_model] -> [..., d_out], on x's GPU and current stream.

    float32, float16 and bfloat16 run on kernels, float64 (gradcheck) runs the definition.
    """
    if args[0].dtype == torch.float64:
        return reference.routed_ffn(*args)
    return _eager(args)[0]


def routed_ffn_with_mask(*args: Any) -> tuple[Tensor, Tensor]:
    """The op on a GPU, and the decision that its kernels took: bool [..., n_experts]."""
    if args[0].dtype == torch.float64:
        return reference.routed_ffn(*args), reference.mask(*args[:4])
    y, wanted = _eager(args)
    n_experts = args[1].shape[0]
    by_token = wanted[:n_experts].unsqueeze(0) if wanted.dim() == 1 else wanted.t()  # a plan, or a mask
    return y, by_token.bool().reshape(*args[0].shape[:-1], n_experts)


def _eager(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    x = args[0]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        return run(Call.of(args, launcher=lambda kernel: kernel), which_path.assumed_density())


def routed_ffn_traceable(*args: Any) -> Tensor:
    """The same for tracers: launches are `torch.library.wrap_triton` nodes, which inductor compiles with the rest."""
    if args[0].dtype == torch.float64:
        return reference.routed_ffn(*args)
    return run(Call.of(args, launcher=torch.library.wrap_triton), which_path.assumed_density())[0]


def run(c: Call, density: float | None) -> tuple[Tensor, Tensor]:
    """With any launcher: the eager one, a tracer's, the recorder of the ahead-of-time table.

    -> y, and what says which token wants which expert: a plan (of one token) or a mask [n_experts, T].
    """
    if c.n_tokens == 0:
        return c.empty(*c.leading, c.d_out), c.empty(c.n_experts, 0, dtype=torch.int8)
    path = which_path.choose_path(c.n_tokens, density, c.tuned("paths"))
    # The op's dtype is x's: autocast would change that of the dense products inside it.
    with torch.autocast("cuda", enabled=False) if torch.is_autocast_enabled("cuda") else nullcontext():
        y, wanted = {"one": one, "union": union, "grouped": grouped, "dense": dense}[path](c)
    return y.reshape(*c.leading, c.d_out), wanted
