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
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ltepass.kernels.reference import ACTIVATIONS
from ltepass.passes.capture.straight_forward import attributes
from ltepass.passes.capture.trace_owner import linears, own_graphs
from ltepass.passes.find.identify_activation import ANOTHER, activation_of
from ltepass.passes.graph.shared_names import join
from ltepass.passes.graph.walk import breadth_first, upstream
from ltepass.routed.gate import gate
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
    """What a node of the owner's forward gives: inputs are made up in fp64, and the rest runs on the values so far."""
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
    """Whether hidden units [1, tokens, d_ff] are what the site's activation makes of these values of up and gate."""
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


def activations_beside(model: nn.Module, site: FFNSite) -> list[str]:
    """Which modules may be the activation: those without parameters beside one of the linears, or in the owner."""
    beside = [
        (join(parent, name), m)
        for parent in parents_of(site)
        for name, m in model.get_submodule(parent).named_children()
    ]
    return sorted(path for path, m in beside if next(m.parameters(), None) is None)


def parents_of(site: FFNSite) -> list[str]:
    """Where a site's activation may lie: in its owner, or in what holds one of its linears."""
    return sorted(
        {path.rpartition(".")[0] for path in (site.up, site.gate, site.down) if path is not None} | {site.owner}
    )


def idle_values(model: nn.Module, site: FFNSite) -> list[str]:
    """Functions and names beside an inline site's linears that may say which activation its forward calls."""
    found = []
    for parent in parents_of(site):
        module = model.get_submodule(parent)
        functions = [name for name, f in functions_in(module).items() if is_elementwise(f)]
        words = [name for name in attributes(module) if isinstance(module.__dict__[name], str)]
        found += [join(parent, name) for name in functions + words]
    return found


def called_before_gate(model: nn.Module, site: FFNSite) -> list[str]:
    """Which modules may be the activation in a user's graph: those that it calls between x and the hidden units."""
    assert isinstance(model, GraphModule)
    gated = next(n for n in model.graph.nodes if n.target is gate and n.args[0].target == site.router)
    _, h, logits = gated.args
    before = set(breadth_first(logits.args[0], lambda n: n.all_input_nodes))
    between = [n for n in breadth_first(h, lambda n: n.all_input_nodes) if n not in before]
    return [str(n.target) for n in between if n.op == "call_module"]


def other_activation(model: nn.Module, site: FFNSite) -> str | None:
    """What tells that something took the activation's place since transform. Of a site without hooks there."""
    is_graph = site.kind == "graph"
    paths = called_before_gate(model, site) if is_graph else activations_beside(model, site)
    beside: list[Callable[[Tensor], object]] = [
        m for m in map(model.get_submodule, paths) if next(m.parameters(), None) is None
    ]
    if site.kind == "inline":
        beside += [f for path in parents_of(site) for f in functions_in(model.get_submodule(path)).values()]
    graphs = () if is_graph else own_graphs(model.get_submodule(site.owner), site)
    return disagrees(model, site, graphs or (), beside, others=True)
