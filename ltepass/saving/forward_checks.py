"""What a checkpoint says that an FFN computes, compared with the owner's own forward: its calls and its activation.

A gate is placed before `down` behind `up`, and the sparse op computes `activation` in place of the forward's lines: a
list that is wrong there would be silently wrong later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NoReturn

from torch import nn
from torch.fx import Graph

from ltepass.errors import CheckpointError, LTEError
from ltepass.passes.capture.guard_replaced_forwards import is_replaced
from ltepass.passes.capture.straight_forward import is_straight
from ltepass.passes.capture.trace_owner import linears, original_class, own_graphs, times_called
from ltepass.passes.graph.walk import upstream
from ltepass.passes.insert.check_activation import disagrees, functions_of
from ltepass.passes.insert.try_gated_copy import check_gated
from ltepass.routed.sites import FFNSite

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
        custom = site.activation.startswith("custom")
        reason = None if custom else disagrees(model, site, graphs, functions_of(owner))
        if reason is not None:
            _refuse(site, reason)


def try_gates(model: nn.Module, sites: Sequence[FFNSite]) -> list[str]:
    """`check_gated` for what a checkpoint made of a model: a list that no other check saw through is refused here."""
    try:
        return check_gated(model, sites)
    except LTEError as error:
        raise CheckpointError(f"the checkpoint's gates do not act on this model ({error}); {_AGAIN}") from error


def _graphs(owner: nn.Module, site: FFNSite) -> tuple[Graph, ...]:
    graphs = own_graphs(owner, site)
    return _refuse(site, f"{type(owner).__name__}.forward cannot be traced") if graphs is None else graphs


def _refuse(site: FFNSite, what: str) -> NoReturn:
    raise CheckpointError(f"site {site.name} of the checkpoint: {what}; {_AGAIN}")


def _check_calls(site: FFNSite, graph: Graph) -> None:
    """Each linear is called once, and down reads what up and gate gave."""
    called = {str(n.target): n for n in graph.nodes if n.op == "call_module"}
    up, gate, down = linears(site)
    for path in (up, gate, down):
        if times_called(graph, path) != 1:
            _refuse(site, f"{path} is not called once in its owner's forward")
        if len(called[path].all_input_nodes) != 1:
            _refuse(site, f"{path} is not called with one input")
    before = upstream(called[down], stop=())
    if not {called[up], called[gate]} <= before:
        _refuse(site, f"{down} does not read what {up} and {gate} give")


def as_gated_now(root: nn.Module, sites: Sequence[FFNSite]) -> list[FFNSite]:
    """A checkpoint's sites: where the owner's forward may not be regenerated here, hooks gate it.

    An older version regenerated forwards that read values which may change; and this instance may run another one.
    """
    owners = {s.owner: root.get_submodule(s.owner) for s in sites if s.kind == "aligned"}
    crooked = {p for p, m in owners.items() if is_replaced(m) or not is_straight(m, original_class(m))}
    return [replace(s, kind="inline") if s.owner in crooked else s for s in sites]
