"""The one table of grouping methods: how neurons become experts (paper section 4.1), each a function of one FFN's rows.

Logarithms of sizes, because a threshold asks which neurons are large, not how large the largest are.
`examples/compare/oracle.py` compares the methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

SMALL = 0.1  # of a token's mean |h|: how small below that is all the same
AUTO = "auto"  # the method with data is output_aware, and without it identity
AUTO_WITH_DATA = "output_aware"


@dataclass(frozen=True, kw_only=True)
class Neurons:
    """Of one FFN. up, gate: [d_ff, d_model], down: [d_ff, d_out], a row per neuron; x: [n_tokens, d_model] and
    h: [n_tokens, d_ff], what it saw.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    x: Tensor | None
    h: Tensor | None


Cluster = Callable[[Tensor], Tensor]  # points [d_ff, n] fp32 -> [d_ff] int64, an order in which clusters lie together


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """order(neurons, cluster, seed): [d_ff] int64, the permutation. data: what activations are to it."""

    order: Callable[[Neurons, Cluster, int], Tensor]
    data: Literal["unused", "helps", "needed"]
    doc: str


def identity(neurons: Neurons, cluster: Cluster, seed: int) -> Tensor:
    return torch.arange(len(neurons.up))


def random(neurons: Neurons, cluster: Cluster, seed: int) -> Tensor:
    return torch.randperm(len(neurons.up), generator=torch.Generator().manual_seed(seed))


def kmeans(neurons: Neurons, cluster: Cluster, seed: int) -> Tensor:
    rows = [w.float() for w in (neurons.gate, neurons.up) if w is not None]
    if neurons.x is None:
        return cluster(torch.cat([nn.functional.normalize(w, dim=1) for w in rows], 1))
    # inputs have few large directions, and only along those does it matter how rows differ
    tokens = nn.functional.normalize(neurons.x.float(), dim=1)
    return cluster(torch.cat([w @ tokens.T for w in rows], 1))


def coactivation(neurons: Neurons, cluster: Cluster, seed: int) -> Tensor:
    assert neurons.h is not None
    return cluster(_log_sizes(neurons.h.float().abs()).T)


def output_aware(neurons: Neurons, cluster: Cluster, seed: int) -> Tensor:
    assert neurons.h is not None
    return cluster(_log_sizes(neurons.h.float().abs() * neurons.down.float().norm(dim=1)).T)


def _log_sizes(size: Tensor) -> Tensor:
    """[n_tokens, d_ff], relative to each token's mean."""
    mean = size.mean(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    return (size / mean + SMALL).log()


GROUPINGS: dict[str, Grouping] = {
    "identity": Grouping(order=identity, data="unused", doc="neighbours, as the model has them"),
    "random": Grouping(order=random, data="unused", doc="by lot"),
    "kmeans": Grouping(order=kmeans, data="helps", doc="alike rows of gate and up (the paper's)"),
    "coactivation": Grouping(order=coactivation, data="needed", doc="large on the same tokens"),
    "output_aware": Grouping(order=output_aware, data="needed", doc="write much to the output on the same tokens"),
}
