"""What a checkpoint says that an FFN computes, compared with the owner's own forward: its calls and its activation.

A gate is placed before `down` behind `up`, and the sparse op computes `activation` in place of the forward's lines: a
list that is wrong there would be silently wrong later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ltepass.errors import CheckpointError, LTEError
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.passes.capture.forward_source import is_straight
from ltepass.passes.capture.replaced_forwards import is_replaced
from ltepass.passes.capture.trace_owner import original_class, trace_owner
from ltepass.passes.insert.selfcheck import check_gated
from ltepass.routed.sites import FFNSite, NeuronRows

_TOKENS = 4
_AGAIN = "load it with the code that it was made with, or delete quantization_config to load it dense"


def check_forwards(model: nn.Module, sites: Iterable[FFNSite]) -> None:
    """Raises CheckpointError where a forward is not as its site says. Changes nothing; `check_sites` has passed."""
    for site in sites:
        owner = model.get_submodule(site.owner)
        if site.kind == "graph":
            continue
        graphs = _graphs(owner, site)
        for graph in graphs:
            _check_calls(site, graph)
        if site.activation.startswith("custom"):
            continue
        # while weights load, everything else is made on the meta device
        with torch.device("cpu"), torch.no_grad(), _evaluating(owner):
            if graphs:
                _check_region(model, owner, site, graphs[-1])
            else:
                _check_functions(owner, site)


def try_gates(model: nn.Module, sites: Sequence[FFNSite]) -> list[str]:
    """`check_gated` for what a checkpoint made of a model: a list that no other check saw through is refused here."""
    try:
        return check_gated(model, sites)
    except LTEError as error:
        raise CheckpointError(f"the checkpoint's gates do not act on this model ({error}); {_AGAIN}") from error


def _graphs(owner: nn.Module, site: FFNSite) -> tuple[Graph, ...]:
    """The owner's own forward, in training and evaluation; none where hooks serve it and it cannot be read."""
    if site.kind == "inline":
        graphs = trace_owner(owner, defaults=True) or ()
        return graphs if all(_calls(graph, path) == 1 for graph in graphs for path in _paths(site)) else ()
    return trace_owner(owner) or _refuse(site, f"{type(owner).__name__}.forward cannot be traced")


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


def _refuse(site: FFNSite, what: str) -> NoReturn:
    raise CheckpointError(f"site {site.name} of the checkpoint: {what}; {_AGAIN}")


def _paths(site: FFNSite) -> list[str]:
    """Of up, gate and down, seen from the owner."""
    cut = len(site.owner) + 1 if site.owner else 0
    return [path[cut:] for path in (site.up, site.gate or site.up, site.down)]


def _calls(graph: Graph, path: str) -> int:
    return sum(n.op == "call_module" and n.target == path for n in graph.nodes)


def _check_calls(site: FFNSite, graph: Graph) -> None:
    """Each linear is called once, and down reads what up and gate gave."""
    calls = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
    up, gate, down = _paths(site)
    for path in (up, gate, down):
        if _calls(graph, path) != 1:
            _refuse(site, f"{path} is not called once in its owner's forward")
        if len(calls[path].all_input_nodes) != 1:
            _refuse(site, f"{path} is not called with one input")
    behind = _behind(calls[down], stop=())
    if not {calls[up], calls[gate]} <= behind:
        _refuse(site, f"{down} does not read what {up} and {gate} give")


def _behind(node: Node, stop: Iterable[Node]) -> set[Node]:
    """Every node that `node` is computed from, up to the nodes of `stop`."""
    ends, found, stack = set(stop), set[Node](), [node]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack += [n for n in new if n not in ends]
    return found


def _check_region(model: nn.Module, owner: nn.Module, site: FFNSite, graph: Graph) -> None:
    """The lines between the linears, run on samples in place of what up and gate give."""
    up, gate, down = (next(n for n in graph.nodes if n.target == path) for path in _paths(site))
    generator = torch.Generator().manual_seed(0)
    samples = {
        node: _sample(model, rows, generator)
        for node, rows in ((up, site.up_rows), (gate, site.gate_rows or site.up_rows))
    }
    (h,) = down.all_input_nodes
    region = _behind(down, stop=samples)
    values: dict[Node, Any] = dict(samples)
    for node in graph.nodes:
        if node in region and node not in values:
            try:
                values[node] = _run(owner, node, values, site.d_model, generator)
            except Exception:  # lines that take no made-up values: nothing is known of them
                return
    hidden = values[h]
    if isinstance(hidden, Tensor) and not _agrees(site, hidden, samples[up], samples[gate]):
        _refuse(site, f"its forward does not compute {site.activation}")


def _sample(model: nn.Module, rows: NeuronRows, generator: torch.Generator) -> Tensor:
    width = model.get_parameter(rows.param).shape[rows.dim]
    return torch.empty(1, _TOKENS, width, dtype=torch.float64).uniform_(-6.0, 6.0, generator=generator)


def _run(owner: nn.Module, node: Node, values: dict[Node, Any], d_model: int, generator: torch.Generator) -> object:
    if node.op == "placeholder":
        return torch.empty(1, _TOKENS, d_model, dtype=torch.float64).uniform_(-1.0, 1.0, generator=generator)
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


def _check_functions(owner: nn.Module, site: FFNSite) -> None:
    """An inline owner's forward cannot be run alone: its activation is one of the functions that it holds."""
    held = {name for f in _functions(owner) for name in [_named(f)] if name}
    if held and site.activation not in held:
        _refuse(site, f"its owner holds {', '.join(sorted(held))}, and not {site.activation}")


def _functions(owner: nn.Module) -> list[Callable[[Tensor], object]]:
    leaves = [m for m in owner.modules() if next(m.children(), None) is None and next(m.parameters(), None) is None]
    plain = [
        v for m in owner.modules() for v in vars(m).values() if callable(v) and not isinstance(v, (nn.Module, type))
    ]
    return [*leaves, *plain]


def _named(function: Callable[[Tensor], object]) -> str | None:
    """Which activation a function is; None for any other, and for what passes its input on (dropout)."""
    sample = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)
    try:
        value = function(sample)
    except Exception:  # it takes something else
        return None
    if not isinstance(value, Tensor) or value.shape != sample.shape:
        return None
    known = ((name, act(sample)) for name, act in ACTIVATIONS.items() if name != "identity")
    return next((name for name, want in known if torch.allclose(value.double(), want, rtol=1e-6, atol=1e-6)), None)


def as_gated_now(root: nn.Module, sites: Sequence[FFNSite]) -> list[FFNSite]:
    """A checkpoint's sites: where the owner's forward may not be regenerated here, hooks gate it.

    An older version regenerated forwards that read values which may change; and this instance may run another one.
    """
    owners = {s.owner: root.get_submodule(s.owner) for s in sites if s.kind == "aligned"}
    crooked = {p for p, m in owners.items() if is_replaced(m) or not is_straight(m, original_class(m))}
    return [replace(s, kind="inline") if s.owner in crooked else s for s in sites]
