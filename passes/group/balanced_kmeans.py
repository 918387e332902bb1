"""Exactly balanced k-means: every cluster gets the same number of points. Linear memory, deterministic for a seed.

Lloyd's iterations with a greedy balanced assignment give a start; then pairs of points change places as long as that
lowers the objective (sum of squared distances to the cluster means), which is where most of the quality comes from:
with eight points a cluster, each point is an eighth of its own centre and Lloyd alone sticks at once.

Only inner products between points are used. Up to WHOLE_GRAM points they are computed once; above, the points are
projected to PROJECTED dimensions and the products recomputed in chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATE_CLUSTERS = 2  # clusters a point tries to move to in one round; more cost time and found nothing better
ROW_CHUNK = 1024  # rows of inner products held at once where the whole does not fit
WHOLE_GRAM = 4096  # points up to which all inner products are kept (64 MB)
PROJECTED = 256  # inner products of random projections keep to about 1 / sqrt(256) of the norms


class _Products:
    """Inner products of n points: rows of them, and each point's with the sum of each cluster."""

    def __init__(self, points: Tensor, random: torch.Generator) -> None:
        self.n = len(points)
        self.whole = self.n <= WHOLE_GRAM
        if not self.whole and points.shape[1] > PROJECTED:
            directions = torch.randn(points.shape[1], PROJECTED, generator=random, dtype=points.dtype)
            points = points @ (directions / PROJECTED**0.5)
        self.points = points
        self.gram = points @ points.T if self.whole else None
        self.square = points.square().sum(1)

    def rows(self, i: Tensor) -> Tensor:
        return self.points[i] @ self.points.T if self.gram is None else self.gram[i]

    def with_sums(self, labels: Tensor, k: int) -> Tensor:
        """[n, k]: p_i . s_c, s_c the sum of cluster c's points."""
        if self.gram is not None:
            return self.gram.new_zeros(k, self.n).index_add_(0, labels, self.gram).T.contiguous()
        sums = self.points.new_zeros(k, self.points.shape[1]).index_add_(0, labels, self.points)
        return self.points @ sums.T


def balanced_kmeans(points: Tensor, seats: int, *, seed: int, lloyd: int = 3, rounds: int = 40) -> Tensor:
    """points: [n, d] any float -> [n] int64 labels in [0, n / seats), each exactly `seats` times."""
    n = len(points)
    assert n % seats == 0, (n, seats)
    k = n // seats
    if seats == 1 or k == 1:
        return torch.arange(n) // seats
    random = torch.Generator().manual_seed(seed)
    products = _Products(points.float(), random)
    start = torch.randperm(n, generator=random)[:k]
    labels = greedy_assignment(2 * products.rows(start).T - products.square[start], seats)
    for _ in range(lloyd):
        dots = products.with_sums(labels, k) / seats
        norms = dots.new_zeros(k).index_add_(0, labels, dots[torch.arange(n), labels]) / seats
        labels = greedy_assignment(2 * dots - norms, seats)
    for _ in range(rounds if products.whole else min(rounds, 12)):
        if not _exchange(products, labels, seats):
            break
    return labels


def greedy_assignment(value: Tensor, seats: int) -> Tensor:
    """value: [n, k], what point i gains in cluster c; n == k * seats -> [n] int64, each cluster exactly `seats` times.

    In rounds: every free point asks for the best cluster that has seats left; each cluster takes the most eager.
    """
    n, k = value.shape
    assert n == k * seats, (n, k, seats)
    labels = torch.full((n,), -1, dtype=torch.int64)
    left = torch.full((k,), seats)
    while (free := (labels < 0).nonzero().squeeze(1)).numel():
        best, cluster = value[free].masked_fill(left == 0, -torch.inf).max(1)
        order = best.argsort(descending=True, stable=True)
        order = order[cluster[order].argsort(stable=True)]
        asked = torch.bincount(cluster, minlength=k)
        rank = torch.arange(len(free)) - (asked.cumsum(0) - asked)[cluster[order]]
        taken = order[rank < left[cluster[order]]]
        labels[free[taken]] = cluster[taken]
        left -= torch.bincount(cluster[taken], minlength=k)
    return labels


def _exchange(products: _Products, labels: Tensor, seats: int) -> int:
    """Swaps pairs in place, the best for both clusters concerned, no cluster twice; returns the number of swaps.

    With equal sizes the objective is -sum_c |s_c|^2 / seats + const, s_c the sum of a cluster's points. Moving i from
    its cluster to c changes p_i . s by m[i, c]; swapping i and j gains m[i, c_j] + m[j, c_i] - 2 p_i . p_j.
    """
    n = products.n
    k = n // seats
    points = torch.arange(n)
    move = products.with_sums(labels, k)
    move -= (move[points, labels] - products.square)[:, None]
    own = move[points, labels]
    move[points, labels] = -torch.inf
    targets = move.topk(min(CANDIDATE_CLUSTERS, k - 1), dim=1).indices
    move[points, labels] = own
    members = labels.argsort(stable=True).view(k, seats)
    gain, partner = products.points.new_empty(n), torch.empty(n, dtype=torch.int64)
    for i in points.split(ROW_CHUNK):
        j = members[targets[i]].flatten(1)
        both = move[i[:, None], labels[j]] + move[j, labels[i][:, None]] - 2 * products.rows(i).gather(1, j)
        gain[i], at = both.max(1)
        partner[i] = j.gather(1, at[:, None]).squeeze(1)
    order = gain.argsort(descending=True, stable=True)
    # A gain below the rounding of the sums could swap the same pair for ever.
    order = order[gain[order] > 1e-5 * products.square.mean(dtype=torch.float64)]
    return _apply_disjoint(labels, order, partner[order], k)


def _apply_disjoint(labels: Tensor, first: Tensor, second: Tensor, k: int) -> int:
    """Swaps are given best first; one is done when no better one, done or pending, touches either of its clusters."""
    done = 0
    a, b = labels[first], labels[second]
    pending = torch.arange(len(first))
    while pending.numel():
        leader = torch.full((k,), len(first))
        leader.scatter_reduce_(0, a[pending], pending, "amin")
        leader.scatter_reduce_(0, b[pending], pending, "amin")
        lead = pending[(leader[a[pending]] == pending) & (leader[b[pending]] == pending)]
        labels[first[lead]], labels[second[lead]] = b[lead], a[lead]
        done += len(lead)
        used = torch.zeros(k, dtype=torch.bool)
        used[a[lead]] = True
        used[b[lead]] = True
        pending = pending[~(used[a[pending]] | used[b[pending]])]
    return done
