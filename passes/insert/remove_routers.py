"""Undo insert_routers and group_neurons: class, forward, hooks and graph as before."""

from __future__ import annotations

import copy

import torch
from torch.fx import Graph, GraphModule

from ltepass.passes.capture.guard_replaced_forwards import release, unwatch
from ltepass.passes.capture.trace_owner import original_class
from ltepass.passes.group.group_neurons import permute_routed
from ltepass.passes.insert.hooks import detach
from ltepass.routed.gate import add_tiers, gate, seen_inputs
from ltepass.routed.routed import Routed, drop_state
from ltepass.routed.sites import FFNSite
from ltepass.routed.token_masks import detach_token_hooks


def remove_routers(routed: Routed, *, undo_grouping: bool) -> None:
    """What `ltepass.remove` does. undo_grouping: neurons too go back to their places."""
    model, sites = routed.model, routed.sites
    detach_token_hooks(model)
    for site in {s.neurons: s for s in sites}.values():  # sites that share their weights share their order
        if undo_grouping:
            permute_routed(routed, site, torch.argsort(routed.router(site).permutation))
    unwatch(model)
    graph = copy.deepcopy(model.graph) if isinstance(model, GraphModule) else Graph()
    for site in sites:
        owner = model.get_submodule(site.owner)
        if site.kind == "aligned":
            owner.__class__ = original_class(owner)
        elif site.kind == "inline":
            detach(owner, [site.name])
        else:
            _ungate(graph, site)
    for site in sites:
        parent, _, child = site.router.rpartition(".")
        del model.get_submodule(parent)._modules[child]
    for module in model.modules():
        release(module)
    if isinstance(model, GraphModule):
        model.graph = graph
    drop_state(model)


def _ungate(graph: Graph, site: FFNSite) -> None:
    """Take a site's nodes out of a user's graph again: what reads its router, and the router."""
    for node in reversed(list(graph.nodes)):  # what reads the logits goes before them
        if node.op != "call_function" or node.target not in (gate, seen_inputs, add_tiers):
            continue
        module, kept, *logits = node.args
        if module.target == site.router:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            for dead in (*logits, module):
                if not dead.users:
                    graph.erase_node(dead)
