"""Planted FFNs among distractors: exactly they are found, whatever order and names; all of it comes off again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ltepass
from ltepass.errors import AlreadyTransformedError, LoweringError, NoFFNFoundError
from ltepass.passes.capture.capture_graphs import CaptureGraphs
from ltepass.passes.find.find_ffn import FindFFN
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.pipeline import TransformJob
from ltepass.routed.routed import router_of, routers_of
from tests.properties.trees import build, captured, examples, flat_graph_of, graph_of, reordered, trees
from tests.typed import lte_state

X = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))
CONFIG = ltepass.LTEConfig(grouping="random")


def found(model: nn.Module, graph: Captured | None = None) -> set[int]:
    """Addresses of the down weights of every site; nothing is changed."""
    job = TransformJob(model=model, config=CONFIG, example_inputs=(X,))
    if graph is None:
        CaptureGraphs()(job)
    else:
        job.captured = [graph]
    try:
        FindFFN()(job)
    except NoFFNFoundError:
        assert job.sites == []
    return {model.get_parameter(s.down_rows.param).data_ptr() for s in job.sites}


@examples(200)
@given(trees, st.integers(0, 99))
def test_exactly_the_planted_are_found_whatever_order_and_names(tree: Any, seed: int) -> None:
    model, planted = build(tree, seed)
    gm = flat_graph_of(model)
    other = reordered(gm, seed)
    assert found(gm, captured(gm, X)) == planted
    assert found(other, captured(other, X)) == planted


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "forwards": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
        "hooks": {n: list(m._forward_pre_hooks.values()) for n, m in model.named_modules()},
        "code": getattr(model, "code", None),
        "training": {n: m.training for n, m in model.named_modules()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    state, was = now.pop("state"), dict(before)["state"]
    assert state.keys() == was.keys()
    assert all(torch.equal(state[k].nan_to_num(7.0), was[k].nan_to_num(7.0)) for k in was)
    assert now == {k: v for k, v in before.items() if k != "state"}


@torch.no_grad()
def check_life(model: nn.Module, planted: set[int]) -> None:
    """transform, again, lower, unlower, remove without and with undoing the grouping."""
    before, expected = snapshot(model), model(X)
    originals = {n: p.clone() for n, p in model.named_parameters()}
    if not planted:
        with pytest.raises(NoFFNFoundError):
            ltepass.transform(model, X, CONFIG)
        assert_same(model, before)
        return
    ltepass.transform(model, X, CONFIG)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    gated = snapshot(model)
    with pytest.raises(AlreadyTransformedError):
        ltepass.transform(model, X, CONFIG)
    assert_same(model, gated)
    for router in routers_of(model):
        router.mode = "hard"
    hard, exact = model(X), copy.deepcopy(model).double()(X.double())
    try:
        ltepass.lower(model)
    except LoweringError:
        assert all(s.activation.startswith("custom(") for s in lte_state(model).sites)
    else:
        # A norm of nearly equal values makes much of the last bit: eager fp32's own distance from fp64 is the measure.
        assert (model(X) - exact).abs().max() <= 1e-4 + 4 * (hard - exact).abs().max()
        ltepass.unlower(model)
    sites = list(lte_state(model).sites)
    permutations = {s.name: router_of(model, s).permutation.clone() for s in sites}
    ltepass.remove(model)
    for site in sites:
        for rows in site.neurons:
            permuted = rows.take(originals[rows.param], site.d_ff)[permutations[site.name]]
            assert torch.equal(rows.of(model, site.d_ff), permuted)
    assert {k: v for k, v in snapshot(model).items() if k != "state"} == {
        k: v for k, v in before.items() if k != "state"
    }
    ltepass.transform(model, X, CONFIG)
    ltepass.remove(model, undo_grouping=True)
    for site in sites:  # the first permutation is still there
        inverse = permutations[site.name].argsort()
        for rows in site.neurons:
            view = rows.of(model, site.d_ff)
            view.copy_(view[inverse].clone())
    assert_same(model, before)
    assert torch.equal(model(X), expected)


@examples(15)
@given(trees, st.integers(0, 99))
def test_the_life_of_a_graph_module(tree: Any, seed: int) -> None:
    model, planted = build(tree, seed)
    check_life(graph_of(model), planted)


@examples(10)
@given(trees, st.integers(0, 99))
def test_the_life_of_a_module(tree: Any, seed: int) -> None:
    model, planted = build(tree, seed)
    assert found(model) == planted
    check_life(model, planted)
