"""What matching hands around: rows of a weight, pieces of a region, misses, sites that were found."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Linear
from ltepass.routed.sites import FFNSite


@dataclass(frozen=True, kw_only=True)
class Miss:
    """Why a linear is not the down projection of an FFN. `near` when enough of an FFN was seen to be worth a line."""

    node: Node
    check: str
    reason: str
    near: bool
    nearest: str = ""
    gate_op: Node | None = None


class MissError(Exception):
    """Raised inside a match; a `Miss` outside of it."""

    def __init__(self, node: Node, check: str, reason: str) -> None:
        super().__init__(reason)
        self.node, self.check, self.reason = node, check, reason


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Neuron i is index start + i * step along `dim` of the leaf `leaf`."""

    leaf: Node
    dim: int
    start: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One factor of the hidden units: the rows of one up linear, and of its bias."""

    linear: Linear
    rows: Rows
    bias: Rows | None


@dataclass(frozen=True)
class Found:
    """A site as it stands in one graph. products: the nodes that read its linears' weights."""

    site: FFNSite
    captured: Captured
    products: frozenset[Node]
