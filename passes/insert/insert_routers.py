"""insert_routers: a trainable router per site, and its gate just before the down projection.

    before:  h = act(gate(x)) * up(x);                            y = down(h)
    after:   x' = seen_inputs(x);  h = act(gate(x')) * up(x');  s = router(x);  h' = gate(h, s);  y = down(h')
             and with inactive="low_bit"  y' = add_tiers(y, s, x)

Legal because down is linear: gating group i of h is gating expert i's share of y. In dense mode the gate hands h on,
and so does `seen_inputs` x, unless `set_input_sparsity` gave it a cut.
An aligned owner gets a regenerated forward, an inline one guarded hooks, a GraphModule two nodes. Only adds: every
parameter keeps its name and value.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from ltepass.config import LTEConfig
from ltepass.errors import CheckpointError
from ltepass.passes.capture.guard_replaced_forwards import remember, watch
from ltepass.passes.capture.trace_owner import OwnerGraphs, trace_owner
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.passes.graph.walk import breadth_first
from ltepass.passes.insert.generated_forwards import forwards_of, regenerate
from ltepass.passes.insert.hooks import InlineSite, attach
from ltepass.passes.insert.try_gated_copy import check_gated
from ltepass.routed.gate import add_tiers, gate, seen_inputs
from ltepass.routed.offloaded import fetched, require_weights
from ltepass.routed.proxy_router import ProxyRouter, proxy_of, require_known, start_proxy
from ltepass.routed.routed import set_state
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, LTEState
from ltepass.routed.tiered_router import require_tierable, start_planes, tiered_of


@dataclass(frozen=True, kw_only=True)
class InsertRouters:
    name: str = "insert_routers"
    tier: Tier = "exact"
    skippable: bool = False

    def __call__(self, job: TransformJob) -> str:
        if job.config.router == "proxy":
            require_known(job.sites)
            require_weights(job.model, 'router "proxy"')
        if job.config.inactive == "low_bit":
            require_tierable(job.sites)
        insert_routers(job.model, job.sites, job.config, traced=job.owner_graphs)
        for site in job.sites:
            if site.name in job.permutations:
                router = job.model.get_submodule(site.router)
                assert isinstance(router, Router)
                router.permutation.copy_(job.permutations[site.name])
            with fetched(job.model, site):
                if job.config.router == "proxy":
                    start_proxy(job.model, site)
                if job.config.inactive == "low_bit":
                    start_planes(job.model, site)
        grouping = job.config.grouping if job.permutations else "identity"
        state = LTEState(job.config.to_dict(), job.sites, job.refusals, grouping=grouping)
        set_state(job.model, state)
        state.untried = check_gated(job.model, job.sites)
        return f"{len(job.sites)} routers"


def insert_routers(
    model: nn.Module,
    sites: Sequence[FFNSite],
    config: LTEConfig,
    device: torch.device | str | None = None,
    traced: Mapping[str, OwnerGraphs | None] | None = None,
) -> None:
    """Add routers and gates from the site list alone: no capture, works on the meta device, used by from_pretrained.

    device: of the routers; None takes the device of the site's down weight.
    traced: by owner, what find_ffn traced of it; None traces here.
    """
    tiered = config.inactive == "low_bit"
    aligned = {s.owner for s in sites if s.kind == "aligned"}
    graphs = {owner: _own_graphs(model, owner, traced) for owner in aligned}
    generator = torch.Generator().manual_seed(config.seed)
    for site in sites:
        where = device if device is not None else _device(model.get_submodule(site.down))
        router = _router(site, config, where)
        router.reset(generator)
        parent, _, child = site.router.rpartition(".")
        model.get_submodule(parent).add_module(child, router)
    for owner, group in groupby(sorted(sites, key=lambda s: s.owner), key=lambda s: s.owner):
        here = list(group)
        gated, inline = ([s for s in here if s.kind == kind] for kind in ("aligned", "inline"))
        for graph in graphs.get(owner, ()):
            insert_gates(graph, gated, tiered=tiered)
        if gated:
            regenerate(model.get_submodule(owner), forwards_of(graphs[owner]))
        if inline:
            attach(model.get_submodule(owner), [inline_site(s) for s in inline])
            remember(model.get_submodule(owner))
    if isinstance(model, GraphModule):
        graph = copy.deepcopy(model.graph)  # the user's own stays whole, should this call fail
        for site in sites:
            if site.kind == "graph":
                _gate_in_user_graph(graph, site, tiered=tiered)
        model.graph = graph
    watch(model, [s.owner for s in sites])


def _router(site: FFNSite, config: LTEConfig, device: torch.device | str | None) -> Router:
    """The kind of router that the config asks for, of this site's sizes."""
    if config.inactive == "low_bit":
        return tiered_of(site, config, device)
    if config.router == "proxy":
        return proxy_of(site, config, device, ProxyRouter)
    cuts = {"cut": config.hidden_sparsity > 0, "input_cut": config.input_sparsity > 0}
    sizes = (site.d_model, site.d_ff, site.group_size)
    return Router(*sizes, bias=config.router_bias, tau=config.tau, device=device, **cuts)


def _device(down: nn.Module) -> torch.device:
    """Where the down projection runs: of offloaded weights, what accelerate's hook says."""
    device = next(down.parameters()).device
    planned = getattr(down.__dict__.get("_hf_hook"), "execution_device", None)
    if device.type == "meta" and planned is not None:
        return torch.empty(0, device=planned).device  # an integer is a GPU's number
    return device


def relative(site: FFNSite, path: str) -> str:
    """A path of the root, seen from the site's owner."""
    return path[len(site.owner) + 1 :] if site.owner else path


def inline_site(site: FFNSite) -> InlineSite:
    up, down, router = (relative(site, p) for p in (site.up, site.down, site.router))
    return InlineSite(site.name, up, down, router, gate=relative(site, site.gate) if site.gate else "")


def _own_graphs(model: nn.Module, owner: str, traced: Mapping[str, OwnerGraphs | None] | None) -> OwnerGraphs:
    """For gates to be put in: the caller's stay as they are."""
    graphs = trace_owner(model.get_submodule(owner)) if traced is None else traced[owner]
    if graphs is None:
        raise CheckpointError(
            f"{owner}: {type(model.get_submodule(owner)).__name__}.forward cannot be traced; expected the class that "
            "the checkpoint was made with; load it with the same transformers version, or transform the dense model"
        )
    return graphs if traced is None else copy.deepcopy(graphs)


def _called(graph: Graph, path: str) -> Node:
    node: Node = next(n for n in graph.nodes if n.op == "call_module" and n.target == path)
    return node


def insert_gates(graph: Graph, sites: Sequence[FFNSite], *, tiered: bool) -> None:
    """Routers and gates in an aligned owner's own graph. tiered: what inactive neurons keep is added behind down."""
    for site in sites:
        up, gate_linear, down = (_called(graph, relative(site, p)) for p in (site.up, site.gate or site.up, site.down))
        inputs = dict.fromkeys((up.all_input_nodes[0], gate_linear.all_input_nodes[0]))  # two views of x at most
        _insert_gate(graph, list(inputs), down, down.all_input_nodes[0], relative(site, site.router), tiered)


def _gate_in_user_graph(graph: Graph, site: FFNSite, *, tiered: bool) -> None:
    by_name = {n.name: n for n in graph.nodes}
    x, h, down = (by_name[name] for name in site.nodes)
    _insert_gate(graph, [x], down, h, site.router, tiered)


def _insert_gate(graph: Graph, inputs: Sequence[Node], down: Node, h: Node, router: str, tiered: bool) -> None:
    region = set(breadth_first(h, lambda n: n.all_input_nodes))
    for x in inputs:
        readers = [n for n in graph.nodes if n in region and x in n.all_input_nodes]
        with graph.inserting_before(readers[0]):
            seen = graph.call_function(seen_inputs, (graph.get_attr(router), x))
        for reader in readers:
            reader.replace_input_with(x, seen)
    with graph.inserting_before(down):
        module = graph.get_attr(router)
        logits = graph.call_module(router, (inputs[0],))
        gated = graph.call_function(gate, (module, h, logits))
    down.replace_input_with(h, gated)
    if tiered:
        with graph.inserting_after(down):
            whole = graph.call_function(add_tiers, (module, down, logits, inputs[0]))
        down.replace_all_uses_with(whole, lambda user: user is not whole)
