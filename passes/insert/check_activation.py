"""Whether an owner's forward computes the activation that its site names, as it stands now.

The sparse op computes `activation` in place of the forward's lines: a checkpoint may name another one, and a module may
take the activation's place after transform.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ltepass.kernels.reference import ACTIVATIONS
from ltepass.passes.capture.straight_forward import attributes
from ltepass.passes.capture.trace_owner import linears
from ltepass.passes.find.identify_activation import ANOTHER, activation_of
from ltepass.passes.graph.walk import upstream
from ltepass.routed.sites import FFNSite, NeuronRows

_TOKENS = 4


def disagrees(
    model: nn.Module,
    site: FFNSite,
    graphs: Sequence[Graph],
    functions: Sequence[Callable[[Tensor], object]],
    *,
    others: bool = False,
) -> str | None:
    """What tells that the site's owner computes another activation; None where it is that one, or nothing tells.

    graphs: the owner's own forward. functions: where it has none, one of those that it holds is the activation.
    others: nothing else is among them, so that what no kernel knows tells as well.
    """
    owner = model.get_submodule(site.owner)
    # while weights load, everything else is made on the meta device
    with torch.device("cpu"), torch.no_grad(), _evaluating(owner):
        return _region(model, owner, site, graphs[-1]) if graphs else _held(functions, site, others)


@contextmanager
def _evaluating(owner: nn.Module) -> Iterator[None]:
    """Flags alone: without dropout."""
    before = {m: m.training for m in owner.modules()}
    try:
        for module in before:
            module.training = False
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _region(model: nn.Module, owner: nn.Module, site: FFNSite, graph: Graph) -> str | None:
    """The lines between the linears, run on samples in place of what up and gate give."""
    up, gate, down = (next(n for n in graph.nodes if n.target == path) for path in linears(site))
    generator = torch.Generator().manual_seed(0)
    samples = {
        node: _sample(model, rows, generator)
        for node, rows in ((up, site.up_rows), (gate, site.gate_rows or site.up_rows))
    }
    (h,) = down.all_input_nodes
    region = upstream(down, stop=samples)
    values: dict[Node, Any] = dict(samples)
    for node in graph.nodes:
        if node in region and node not in values:
            try:
                values[node] = _run(owner, node, values, site.d_model, generator)
            except Exception:  # lines that take no made-up values: nothing is known of them
                return None
    hidden = values[h]
    agrees = not isinstance(hidden, Tensor) or _agrees(site, hidden, samples[up], samples[gate])
    return None if agrees else f"its forward does not compute {site.activation}"


def _sample(model: nn.Module, rows: NeuronRows, generator: torch.Generator) -> Tensor:
    width = model.get_parameter(rows.param).shape[rows.dim]
    return torch.empty(1, _TOKENS, width, dtype=torch.float64, device="cpu").uniform_(-6.0, 6.0, generator=generator)


def _run(owner: nn.Module, node: Node, values: dict[Node, Any], d_model: int, generator: torch.Generator) -> object:
    if node.op == "placeholder":
        x = torch.empty(1, _TOKENS, d_model, dtype=torch.float64, device="cpu")
        return x.uniform_(-1.0, 1.0, generator=generator)
    args = map_arg(node.args, lambda n: values[n])
    kwargs = map_arg(node.kwargs, lambda n: values[n])
    if node.op == "call_module":
        return owner.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(owner)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _agrees(site: FFNSite, h: Tensor, up: Tensor, gate: Tensor) -> bool:
    rows, gate_rows = site.up_rows.indices(site.d_ff), (site.gate_rows or site.up_rows).indices(site.d_ff)
    u, g = up[..., list(rows)], gate[..., list(gate_rows)]
    act = ACTIVATIONS[site.activation]
    expected = act(u) if site.gate is None else act(g) * u
    # a cast inside the forward rounds; two activations differ by far more somewhere in these values
    return h.shape == expected.shape and torch.allclose(h.double(), expected, rtol=1e-2, atol=1e-4)


def _held(functions: Sequence[Callable[[Tensor], object]], site: FFNSite, others: bool) -> str | None:
    """An inline owner's forward cannot be run alone: its activation is one of the functions that it holds."""
    held = {name for f in functions for name in [activation_of(f)] if name and (others or name != ANOTHER)}
    wrong = held and site.activation not in held
    return f"its owner holds {', '.join(sorted(held))}, and not {site.activation}" if wrong else None


def functions_of(owner: nn.Module) -> list[Callable[[Tensor], object]]:
    leaves = [m for m in owner.modules() if next(m.children(), None) is None and next(m.parameters(), None) is None]
    return [*leaves, *(f for m in owner.modules() for f in functions_in(m).values())]


def functions_in(module: nn.Module) -> dict[str, Callable[[Tensor], object]]:
    """What an instance holds that may be called and is no module, by its name there."""
    held = {name: module.__dict__[name] for name in attributes(module)}
    return {name: f for name, f in held.items() if callable(f) and not isinstance(f, type)}


def is_elementwise(function: Callable[[Tensor], object]) -> bool:
    """Whether it may stand for an activation."""
    with torch.device("cpu"), torch.no_grad():
        return activation_of(function) is not None
