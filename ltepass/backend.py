"""The torch.compile backend "lte": gate regions become `ltepass::routed_ffn`, inductor compiles the rest.

Found through the entry point group `torch_dynamo_backends`, so user code needs no import:
`torch.compile(model, backend="lte")`. Graphs that train, and graphs without a hard gate, go to inductor unchanged.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from ltepass import ops as ops  # registers the op that the pass emits
from ltepass.dataflow import is_gate
from ltepass.kernels import tuning
from ltepass.passes.lower_routed_ffn import LowerRoutedFFN, router_path
from ltepass.router import Router as Router  # registers ltepass::gate, whose name graphs carry

log = logging.getLogger("ltepass")


@dataclass(frozen=True, kw_only=True)
class CompiledGraph:
    """One graph that Dynamo handed over: gates seen, regions lowered, a reason for each gate kept masked-dense."""

    gates: int
    lowered: int
    notes: list[str] = field(default_factory=list)


history: list[CompiledGraph] = []  # what this process compiled, newest last; `ltepass.report` and tests read it


def lte(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    kept: Callable[[str, str], None] | None = None,
) -> Callable[..., Any]:
    """Dynamo's backend signature. mode, options: as torch.compile has them for inductor.

    kept: is told the path of the router and the reason for each gate that stays masked-dense.
    """
    from torch._inductor.compile_fx import compile_fx

    gates = sum(is_gate(n) for n in gm.graph.nodes)
    lowered, notes = 0, dict[str, str]()
    if gates and not _trains(example_inputs):
        lowered, notes = LowerRoutedFFN()(gm)
    elif gates:
        notes = {router_path(n): "the graph is traced with gradients" for n in gm.graph.nodes if is_gate(n)}
    if kept is not None:
        for path, reason in notes.items():
            kept(path, reason)
    lines = [f"{path}: {reason}" for path, reason in notes.items()]
    history.append(CompiledGraph(gates=gates, lowered=lowered, notes=lines))
    log.info("lte backend: %d gates, %d lowered%s", gates, lowered, "".join(f"; {line}" for line in lines))
    if not any(g.gates for g in history) and not _holds_op(gm) and len(history) == 1:
        warnings.warn(
            "torch.compile(backend='lte') got a graph with no gate; expected a model that ltepass.transform changed, "
            "in hard mode; inductor compiles it as it is",
            stacklevel=2,
        )
    with tuning.assume_density(_density(example_inputs)):
        compiled: Any = compile_fx(gm, example_inputs, config_patches=_patches(mode, options))
    on_cpu = all(t.device.type == "cpu" for t in example_inputs if isinstance(t, Tensor))
    return _below_autograd(compiled) if lowered and on_cpu else compiled  # type: ignore[no-any-return]


def _below_autograd(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ops without the Python frame of the op's autograd rule where nothing can ask for a gradient; see
    `ltepass.ops.routed_ffn`. Legal: the graph was compiled as one that does not train, and Dynamo guards on that. On a
    GPU inductor sees the kernels themselves, and there is no such frame.
    """

    @functools.wraps(compiled)
    def call(*args: Any) -> Any:
        if ops.asks_for_gradients():
            return compiled(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return compiled(*args)

    return call


def _density(example_inputs: Sequence[Any]) -> float | None:
    """Mean over the graph's routers that are known, by the thresholds among its inputs; None where none is."""
    scalars = [t for t in example_inputs if isinstance(t, Tensor) and t.dim() == 0 and not isinstance(t, FakeTensor)]
    known = [density for t in scalars if (density := tuning.density_of(t)) is not None]
    return sum(known) / len(known) if known else None


def _trains(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _holds_op(gm: GraphModule) -> bool:
    return any(n.target is torch.ops.ltepass.routed_ffn.default for n in gm.graph.nodes)


def _patches(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    chosen = list_mode_options(mode) if mode and mode != "default" else {}
    return {**chosen, **(options or {})}
