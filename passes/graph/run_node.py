"""Runs one node of a graph on other values than those that it was traced with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from ltepass.passes.graph.node_kinds import concrete, value


def call(node: Node, args: tuple[Any, ...], kwargs: dict[str, object]) -> object:
    """Run what a node does on other values."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Callable[..., object] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def run(node: Node, values: Mapping[Node, Argument]) -> Any:
    """Run a node with some inputs replaced; sizes become integers."""

    def lookup(n: Node) -> Argument:
        if n in values:
            return values[n]
        v = value(n)
        if isinstance(v, torch.SymFloat):  # math.pi, say, under dynamic=True: float() guards the graph on its value
            return float(v)
        return v if isinstance(v, (int, float, bool)) else concrete(v) if isinstance(v, torch.SymInt) else v

    args = map_arg(node.args, lookup)
    kwargs = map_arg(node.kwargs, lookup)
    plain = torch.utils._pytree.tree_map_only(torch.SymInt, concrete, (args, kwargs))
    return call(node, *plain)
