"""Balanced k-means: exactly balanced, deterministic, close to the best partition, fast and small at full size."""

from __future__ import annotations

import resource
import time
from functools import cache
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltepass.passes.group import balanced_kmeans as balanced
from ltepass.passes.group.balanced_kmeans import balanced_kmeans, greedy_assignment


def objective(points: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the means of the clusters, in fp64."""
    points = points.double()
    return float(sum(((p := points[labels == c]) - p.mean(0)).square().sum() for c in labels.unique()))


def best_objective(points: Tensor, seats: int) -> float:
    """The exact optimum over every partition into groups of `seats`, by dynamic programming over sets of points."""
    n = len(points)
    groups = list(combinations(range(n), seats))
    members = points.double()[torch.tensor(groups)]
    costs = (members - members.mean(1, keepdim=True)).square().sum((1, 2)).tolist()
    by_first: dict[int, list[tuple[int, float]]] = {}
    for group, cost in zip(groups, costs, strict=True):
        by_first.setdefault(group[0], []).append((sum(1 << i for i in group), cost))

    @cache
    def best(left: int) -> float:
        if not left:
            return 0.0
        first = (left & -left).bit_length() - 1  # the lowest point left has to be in some group
        return min(cost + best(left & ~group) for group, cost in by_first[first] if group & left == group)

    return best((1 << n) - 1)


@settings(deadline=None, max_examples=60)
@given(
    k=st.integers(1, 13), seats=st.integers(1, 9), d=st.integers(1, 20), seed=st.integers(0, 999), equal=st.booleans()
)
def test_every_cluster_gets_exactly_its_seats(k: int, seats: int, d: int, seed: int, equal: bool) -> None:
    points = torch.randn(k * seats, d, generator=torch.Generator().manual_seed(seed))
    if equal:
        points = points.round()  # ties and points that coincide
    labels = balanced_kmeans(points, seats, seed=seed)
    assert torch.equal(torch.bincount(labels, minlength=k), torch.full((k,), seats))


@pytest.mark.parametrize("whole", [4096, 0], ids=["all products kept", "products in chunks"])
def test_planted_clusters_are_found(monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    monkeypatch.setattr(balanced, "WHOLE_GRAM", whole)
    monkeypatch.setattr(balanced, "ROW_CHUNK", 7)
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(60) // 5
    points = (5 * torch.randn(12, 30, generator=g))[truth] + 0.1 * torch.randn(60, 30, generator=g)
    shuffled = torch.randperm(60, generator=g)
    labels = balanced_kmeans(points[shuffled], 5, seed=3)
    together = labels[:, None] == labels
    assert torch.equal(together, truth[shuffled][:, None] == truth[shuffled])


@pytest.mark.parametrize(("n", "seats"), [(8, 2), (8, 4), (9, 3), (12, 3), (12, 4), (15, 5)])
def test_objective_is_within_three_percent_of_the_best_partition(n: int, seats: int) -> None:
    """Mean over twenty random cases without structure, the hardest kind; three seeds each, as points are few."""
    excess = []
    for case in range(20):
        points = torch.randn(n, 4, generator=torch.Generator().manual_seed(case))
        found = min(objective(points, balanced_kmeans(points, seats, seed=s)) for s in range(3))
        excess.append(found / best_objective(points, seats) - 1)
    assert min(excess) > -1e-9  # else the reference is no optimum
    assert sum(excess) / len(excess) < 0.03, excess


def test_exchanges_improve_on_lloyd_alone() -> None:
    points = torch.randn(96, 12, generator=torch.Generator().manual_seed(5))
    alone = objective(points, balanced_kmeans(points, 8, seed=0, rounds=0))
    assert objective(points, balanced_kmeans(points, 8, seed=0)) < 0.97 * alone


def test_same_seed_same_labels_and_no_touch_of_the_global_rng() -> None:
    points = torch.randn(70, 9, generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    first, again, other = (balanced_kmeans(points, 7, seed=s) for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_greedy_assignment_serves_the_most_eager_first() -> None:
    value = torch.tensor([[3.0, 0.0], [9.0, 0.0], [5.0, 1.0], [1.0, 0.0]])
    assert greedy_assignment(value, 2).tolist() == [1, 0, 0, 1]


@pytest.mark.slow
def test_a_layer_of_a_7b_model_takes_seconds_and_linear_memory() -> None:
    points = torch.randn(11008, 4096, generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    labels = balanced_kmeans(points, 32, seed=0)
    assert time.perf_counter() - start < 30
    assert torch.equal(torch.bincount(labels), torch.full((344,), 32))
    # a full matrix of pairs would be 485 MB
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6 < 0.4


@pytest.mark.slow
def test_a_layer_of_smollm2_takes_half_a_second() -> None:
    """Co-activation of 1,536 neurons over 2,048 tokens into 192 experts; CPU seconds of one thread, best of three."""
    points = torch.randn(1536, 2048, generator=torch.Generator().manual_seed(0)).abs()
    taken = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in range(3):
        start = time.process_time()
        balanced_kmeans(points, 8, seed=seed)
        taken.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(taken) < 0.5, taken
