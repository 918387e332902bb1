"""Lets compilers see the GPU kernels inside `ltepass::routed_ffn`; on a CPU the op stays one opaque call.

The rule runs where AOTAutograd functionalizes, as `torch.library.triton_op` does. It must not be an entry of inductor's
decomposition table: those run after functionalization, where a launch is a mutation that nothing seems to use, and dead
code elimination drops all three without a word. Importing this file imports neither triton nor a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

OP = "ltepass::routed_ffn"


def register(library: torch.library.Library) -> None:
    """Once, by the module that defines the op."""
    torch.library.register_torch_dispatch(OP, FunctionalTensorMode, decompose, lib=library)


def decompose(
    mode: FunctionalTensorMode, op: Any, types: tuple[type, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The op as kernel launches that a graph can hold, where x is on a GPU and the graph is being compiled."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    known = (FakeTensor, FunctionalTensor, torch.Tensor, torch.nn.Parameter)
    if not all(issubclass(t, known) for t in types):
        return NotImplemented
    # An exported program keeps the op: kernels would make it good for one kind of device only.
    exporting = custom_triton_ops_decomposition_disabled()
    cuts_inputs = len(args) > 12 and args[12] is not None  # which no GPU kernel does
    if args[0].device.type != "cuda" or exporting or cuts_inputs:
        return mode.__torch_dispatch__(op, types, args, kwargs)
    from ltepass.kernels.gpu.launch import routed_ffn_traceable

    with mode:
        return routed_ffn_traceable(*args, **kwargs)
