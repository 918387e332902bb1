"""Names of sites, and of the routers that they will have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from ltepass.routed.sites import FFNSite, site_name


def number_sites(sites: Iterable[FFNSite]) -> list[FFNSite]:
    """With a number in the name where an owner has several sites."""
    sites = list(sites)
    several, seen, named = Counter(s.owner for s in sites), Counter[str](), []
    for s in sites:
        named.append(s if several[s.owner] == 1 else replace(s, name=site_name(s, str(seen[s.owner]))))
        seen[s.owner] += 1
    return named


def name_routers(root: nn.Module, sites: Iterable[FFNSite]) -> list[FFNSite]:
    """A free attribute of the owner for each router: `router`, or `lte_router`, numbered as the site is."""
    named = []
    for s in sites:
        owner = root.get_submodule(s.owner)
        base = "lte_router" if hasattr(owner, "router") or isinstance(root, GraphModule) else "router"
        name = base if s.name == site_name(s, None) else f"{base}_{s.number}"
        named.append(replace(s, router=".".join(p for p in (s.owner, name) if p)))
    return named
