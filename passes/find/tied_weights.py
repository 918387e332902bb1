"""FFNs whose weights are read elsewhere too: which of them are one site, and which are refused."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from torch.fx import Node

from ltepass.passes.find.match_types import Found
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.node_kinds import is_movement, op_name
from ltepass.passes.graph.walk import consumers, strip_identity
from ltepass.routed.sites import FFNSite, NeuronRows, Refusal


def refuse_tied(found: Iterable[Found], captured: list[Captured]) -> tuple[list[FFNSite], list[Refusal]]:
    """One site for each module of an FFN, however often called; FFNs whose parameters others read too are refused.

    Else permuting its neurons, or gating them in one place, would change what the other place computes. Modules that
    share all of an FFN's weights (Zamba's blocks) are a site each, with a router each and one order of the neurons.
    """
    by_rows: dict[tuple[NeuronRows, ...], list[Found]] = defaultdict(list)
    for f in found:
        by_rows[f.site.neurons].append(f)
    claims = Counter(name for rows in by_rows for name in {r.param for r in rows})
    explained = {id(c): set[Node]() for c in captured}
    for f in found:
        explained[id(f.captured)] |= f.products
    elsewhere = {
        name
        for c in captured
        for leaf, name in c.flow.leaves.items()
        if name in claims and not _readers(leaf) <= explained[id(c)]
    }
    kept, refusals = [], []
    for rows, group in by_rows.items():
        site = group[0].site
        tied = next((r.param for r in rows if r.param in elsewhere or claims[r.param] > 1), None)
        sites = list(dict.fromkeys(f.site for f in group))
        if tied is None and any(s.kind == "graph" for s in sites[1:]):
            tied = rows[0].param  # a graph's site is one place in it: the other would stay dense
        if tied is None:
            kept += sites
        else:
            reason = f"{tied} is also used elsewhere, so its neurons cannot be permuted or gated here alone"
            refusals.append(Refusal(module=site.owner, node=site.down, check="tied", reason=reason))
    return kept, refusals


def _readers(leaf: Node) -> set[Node]:
    """The nodes that compute with a weight, seen through casts and transposes: is it an FFN's alone?"""
    readers: set[Node] = set()
    stack = [leaf]
    while stack:
        for user in consumers(stack.pop()):
            if is_movement(user) or strip_identity(user) is not user:
                stack.append(user)
            elif op_name(user) not in ("size", "sym_size", "getattr"):
                readers.add(user)
    return readers
