"""The torch.compile backend "lte": gate regions become `ltepass::routed_ffn`, inductor compiles the rest.

Found through the entry point group `torch_dynamo_backends`, so user code needs no import:
`torch.compile(model, backend="lte")`. Other linears become `ltepass::linear`. Graphs that train go to inductor as they
are.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter
from torch.utils.weak import WeakIdKeyDictionary

from ltepass.kernels import dispatch, routed_ffn  # noqa: F401 -- routed_ffn registers the op that the pass emits
from ltepass.kernels.gpu import which_path
from ltepass.passes.graph.node_kinds import is_gate, is_tiers
from ltepass.passes.graph.pipeline import GraphJob, Pass, run_passes
from ltepass.passes.lower.lower_linears import LowerLinears
from ltepass.passes.lower.lower_routed_ffn import LowerRoutedFFN, holds_ffn, router_path
from ltepass.passes.lower.lower_tiers import LowerTiers
from ltepass.routed import gate as _gate  # noqa: F401  # registers ltepass::gate, whose name graphs carry

if TYPE_CHECKING:
    from torch._inductor.utils import InputType

log = logging.getLogger("ltepass")


BACKEND: tuple[Pass[GraphJob], ...] = (LowerRoutedFFN(), LowerTiers(), LowerLinears())

_warned: MutableMapping[Parameter, str] = (
    WeakIdKeyDictionary()
)  # the first weight of each graph that a warning was about, while it lives


def lte(
    gm: GraphModule,
    example_inputs: Sequence[InputType],
    *,
    mode: str | None = None,
    options: dict[str, object] | None = None,
    kept: Callable[[str, str], None] | None = None,
    ffn: bool = True,
) -> Callable[..., object]:
    """Dynamo's backend signature. mode, options: as torch.compile has them for inductor.

    kept: is told the path of the router and the reason for each gate that stays masked-dense. ffn: False lowers
    linears alone, of a dense model too.
    """
    from torch._inductor.compile_fx import compile_fx

    gates = [n for n in gm.graph.nodes if is_gate(n) or is_tiers(n)]
    job, trains = GraphJob(gm), _trains(example_inputs)
    if gates and trains:
        job.notes = {router_path(n): "the graph is traced with gradients" for n in gates}
        _warn_of_gradients(gates, example_inputs)
    elif ffn and not gates and not _holds_op(gm) and holds_ffn(gm):
        _warn_of_no_gate(example_inputs)
    if not trains:
        run_passes([p for p in BACKEND if ffn or p.name == "lower_linears"], job)
    if kept is not None:
        for path, reason in job.notes.items():
            kept(path, reason)
    lines = "".join(f"; {path}: {reason}" for path, reason in job.notes.items())
    log.info("lte backend: %d gates, %d lowered%s", len(gates), job.lowered, lines)
    with which_path.assume_density(_density(example_inputs)):
        compiled: Any = compile_fx(gm, example_inputs, config_patches=_patches(mode, options))
    on_cpu = all(t.device.type == "cpu" for t in example_inputs if isinstance(t, Tensor))
    return _below_autograd(compiled) if (job.lowered or job.linears) and on_cpu else compiled


def _below_autograd(compiled: Callable[..., object]) -> Callable[..., object]:
    """Calls ops without the Python frame of the op's autograd rule where nothing can ask for a gradient; see
    `ltepass.kernels.routed_ffn.routed_ffn`. Legal: the graph was compiled as one that does not train, and Dynamo guards
    on that. On a GPU inductor sees the kernels themselves, and there is no such frame.
    """

    @functools.wraps(compiled)
    def call(*args: object) -> object:
        if dispatch.asks_for_gradients():
            return compiled(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return compiled(*args)

    return call


def _warn_of_gradients(gates: Iterable[Node], example_inputs: Sequence[InputType]) -> None:
    hard = [router_path(n) for n in gates if is_tiers(n) or n.args[3] is False]
    if hard:
        _warn_once(
            example_inputs,
            f"torch.compile(backend='lte') got {len(hard)} hard gates (first: {hard[0]}) in a graph that is traced "
            "with gradients, and lowered none: they stay masked-dense, which is exact and no faster; for inference "
            "call the model under torch.no_grad() or torch.inference_mode(), or freeze it with "
            "model.requires_grad_(False)",
        )


def _warn_of_no_gate(example_inputs: Sequence[InputType]) -> None:
    _warn_once(
        example_inputs,
        "torch.compile(backend='lte') got a graph with an FFN and no gate; expected a model that ltepass.transform "
        'changed, in hard mode (ltepass.set_mode(model, "hard")); nothing of it is sparse',
    )


def _warn_once(example_inputs: Sequence[InputType], text: str) -> None:
    """Once for each model: its graphs for other sizes have the same weights."""
    weight = next((t for t in example_inputs if isinstance(t, Parameter)), None)
    if weight is not None and _warned.get(weight) == text:
        return
    if weight is not None:
        _warned[weight] = text
    warnings.warn(text, stacklevel=3)


def _density(example_inputs: Sequence[InputType]) -> float | None:
    """Mean over the graph's routers that know theirs, which their thresholds carry; None where none does."""
    carried = [getattr(t, "density", None) for t in example_inputs if isinstance(t, Tensor)]
    known = [density for density in carried if density is not None]
    return sum(known) / len(known) if known else None


def _trains(example_inputs: Sequence[InputType]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _holds_op(gm: GraphModule) -> bool:
    ops = torch.ops.ltepass
    ours = (ops.routed_ffn.default, ops.routed_proxy_ffn.default, ops.tiered_ffn.default)
    return any(n.target in ours for n in gm.graph.nodes)


def _patches(mode: str | None, options: dict[str, object] | None) -> dict[str, object]:
    """Inductor's settings: those of torch.compile's mode, and the options on top."""
    from torch._inductor import list_mode_options

    chosen = list_mode_options(mode) if mode and mode != "default" else {}
    return {**chosen, **(options or {})}
