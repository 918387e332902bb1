"""Grouping methods and the permutation that applies them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ltepass
from ltepass.calibration import initialise
from ltepass.calibration.energy import down_energy, expert_energy, fit_energies, log_energy
from ltepass.calibration.ridge import RIDGE, RidgeSums
from ltepass.errors import CalibrationError, ConfigError
from ltepass.grouping_methods import AUTO, GROUPINGS, Grouping
from ltepass.passes.group.group_neurons import grouping_permutation, permute_routed, site_permutation
from ltepass.routed import samples
from ltepass.routed.routed import router_of
from ltepass.routed.samples import Sample, collect
from ltepass.saving.state_json import read_state, write_state
from tests.training.learning_cases import (
    assert_same,
    calibrated,
    dense_model,
    router_inputs,
    tokens,
    transformed,
    weights,
)
from tests.typed import lte_state, routed

METHODS = tuple(GROUPINGS)


def arguments(d_ff: int = 60, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    up, gate, down = (torch.randn(d_ff, 12, generator=g) for _ in range(3))
    seen = Sample(x=torch.randn(33, 12, generator=g), h=torch.randn(33, d_ff, generator=g))
    return {"up": up, "gate": gate, "down": down, "sample": seen}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [1, 5, 60])
def test_a_permutation_that_depends_on_the_seed_alone(method: str, group_size: int) -> None:
    before = torch.random.get_rng_state()
    first, again = (grouping_permutation(method, **arguments(), group_size=group_size, seed=7) for _ in range(2))
    assert first.sort().values.tolist() == list(range(60))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())


def test_kmeans_groups_by_gate_and_up_and_by_up_in_a_plain_ffn() -> None:
    labels = torch.randperm(60, generator=torch.Generator().manual_seed(0)) // 5
    directions = torch.nn.functional.one_hot(labels, 12).float()
    lengths = torch.arange(1.0, 61.0)[:, None]  # k-means on rows as they are would group by length
    noise = arguments() | {"sample": None}
    planted = directions * lengths
    both: tuple[dict[str, Any], ...] = ({"gate": planted}, {"up": planted}, {"up": planted, "gate": None})
    for rows in both:
        assert _groups("kmeans", {**noise, **rows}) == _planted(labels)


def test_coactivation_finds_neurons_that_fire_together() -> None:
    """Of like sizes: a few tokens have no active neuron at all, and one is far larger than the rest."""
    labels = torch.randperm(60, generator=torch.Generator().manual_seed(1)) // 5
    g = torch.Generator().manual_seed(2)
    fires = (torch.rand(200, 12, generator=g) < 0.2).float()[:, labels]
    sign = torch.randint(0, 2, (200, 60), generator=g) * 2 - 1
    h = fires * sign * torch.linspace(1.0, 2.0, 60)
    h[:5], h[5] = 0.0, 1e4 * h[5]
    assert _groups("coactivation", {**arguments(), "sample": _saw(h)}) == _planted(labels)


def test_output_aware_puts_neurons_of_one_importance_together() -> None:
    """All fire alike: what differs is the size of the down rows, which coactivation does not see."""
    g = torch.Generator().manual_seed(3)
    labels = torch.randperm(60, generator=g) // 5
    down = torch.nn.functional.normalize(torch.randn(60, 12, generator=g), dim=1) * (1 + labels[:, None])
    h = torch.ones(50, 60) * (1 + torch.rand(50, 1, generator=g))
    given = {**arguments(), "down": down, "sample": _saw(h)}
    assert _groups("output_aware", given) == _planted(labels)
    assert _groups("coactivation", given) != _planted(labels)


def test_kmeans_with_inputs_groups_by_the_directions_that_they_have() -> None:
    """Rows differ most where no input ever points; there the directions alone find other groups."""
    labels = torch.randperm(60, generator=torch.Generator().manual_seed(0)) // 5
    g = torch.Generator().manual_seed(5)
    rows = torch.cat([torch.nn.functional.one_hot(labels, 12).float(), 5 * torch.randn(60, 12, generator=g)], 1)
    x = torch.cat([torch.randn(50, 12, generator=g), torch.zeros(50, 12)], 1)
    seen = Sample(x, h=torch.ones(50, 60))
    for gate in (rows, None):
        site = {**arguments(), "gate": gate, "up": rows}
        assert _groups("kmeans", {**site, "sample": seen}) == _planted(labels)
        assert _groups("kmeans", {**site, "sample": None}) != _planted(labels)


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "output_aware"])
def test_no_token_counts_more_for_being_larger(method: str) -> None:
    given, scale = arguments(), 2.0 ** torch.randint(-8, 9, (33, 1), generator=torch.Generator().manual_seed(4))
    sample = given["sample"]
    assert isinstance(sample, Sample)
    scaled = Sample(scale * sample.x, scale * sample.h)
    assert _groups(method, given) == _groups(method, {**given, "sample": scaled})


def _saw(h: Tensor) -> Sample:
    return Sample(x=torch.ones(len(h), 12), h=h)


def _groups(method: str, given: dict[str, Any]) -> set[frozenset[int]]:
    permutation = grouping_permutation(method, **given, group_size=5, seed=0)
    return {frozenset(group.tolist()) for group in permutation.view(-1, 5)}


def _planted(labels: Tensor) -> set[frozenset[int]]:
    return {frozenset((labels == c).nonzero().flatten().tolist()) for c in labels.unique()}


def test_refusals_name_the_method() -> None:
    without = {**arguments(), "sample": None}
    with pytest.raises(CalibrationError, match="'coactivation' needs activations"):
        grouping_permutation("coactivation", **without, group_size=5, seed=0)
    with pytest.raises(ConfigError, match="'nearest'"):
        grouping_permutation("nearest", **arguments(), group_size=5, seed=0)


def test_permuting_leaves_the_function_and_its_inverse_restores_every_bit() -> None:
    model, x = transformed(), tokens(3)
    before, logits = weights(model), model(x).logits
    site = model._lte.sites[1]
    permutation = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    permute_routed(routed(model), site, permutation)
    assert not torch.equal(weights(model)[f"{site.down}.weight"], before[f"{site.down}.weight"])
    torch.testing.assert_close(model(x).logits, logits, rtol=1e-5, atol=1e-6)
    permute_routed(routed(model), site, permutation.argsort())
    assert_same(before, weights(model))


def test_the_router_records_the_composition_of_permutations() -> None:
    model = transformed()
    site = model._lte.sites[0]
    original = model.get_submodule(site.up).weight.clone()
    for seed in (0, 1):
        permute_routed(routed(model), site, torch.randperm(60, generator=torch.Generator().manual_seed(seed)))
    recorded = router_of(model, site).permutation
    assert torch.equal(model.get_submodule(site.up).weight, original[recorded])


@pytest.mark.parametrize("bad", [[0] * 60, list(range(59)), list(range(1, 61))])
def test_no_permutation_no_change(bad: list[int]) -> None:
    model = transformed()
    before = weights(model)
    with pytest.raises(ConfigError, match="permutation of 60 neurons"):
        permute_routed(routed(model), model._lte.sites[0], torch.tensor(bad))
    assert_same(before, weights(model))


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "output_aware"])
def test_each_method_loses_less_than_random_groups_under_an_oracle(method: str) -> None:
    """At half the experts by energy, on text that was not used for grouping."""
    lost = {name: _oracle_loss(name) for name in ("random", method)}
    assert lost[method] < 0.97 * lost["random"], lost


def _oracle_loss(method: str) -> float:
    model = transformed(group_size=5)
    ltepass.calibrate(model, [tokens(40)], grouping=method)
    fresh = collect(routed(model), [tokens(20, seed=9)])
    lost = []
    for site in model._lte.sites:
        down = site.down_rows.of(model, site.d_ff).detach()
        energy = (fresh[site.name].h.float() * down.norm(dim=1)).square().unflatten(-1, (-1, 5)).sum(-1)
        half = energy.topk(energy.shape[1] // 2, dim=1, largest=False).values
        lost.append(float(half.sum() / energy.sum()))
    return sum(lost) / len(lost)


def test_transform_with_data_groups_by_the_configured_method() -> None:
    plain, model = dense_model(), calibrated(grouping="output_aware")
    assert ltepass.report(model).grouping == "output_aware"
    assert not torch.equal(router_of(model, model._lte.sites[0]).permutation, torch.arange(60))
    ltepass.remove(model, undo_grouping=True)
    assert_same(weights(plain), weights(model))


def test_kmeans_groups_by_inputs_at_the_first_calibration_only() -> None:
    """Also where transform had grouped by rows."""
    model = transformed(grouping="kmeans")
    assert ltepass.report(model).grouping == "kmeans"
    seen = collect(routed(model), [tokens(8)])
    by_inputs = [
        order[site_permutation(model, site, "kmeans", seen[site.name], seed=0)]
        for order, site in zip(_orders(model), model._lte.sites, strict=True)
    ]
    for _ in range(2):
        ltepass.calibrate(model, [tokens(8)])
        assert all(torch.equal(a, b) for a, b in zip(by_inputs, _orders(model), strict=True))
    ltepass.calibrate(model, [tokens(8)], grouping="identity")
    assert ltepass.report(model).grouping == "kmeans"
    waited = calibrated(grouping="kmeans")
    assert not any(
        torch.equal(a, b) for a, b in zip(_orders(transformed(grouping="kmeans")), _orders(waited), strict=True)
    )


def test_the_report_names_the_grouping_of_a_transform_without_data() -> None:
    model = transformed(grouping="random")
    order = _orders(model)
    assert ltepass.report(model).grouping == "random"
    ltepass.calibrate(model, [tokens(8)])
    assert all(torch.equal(a, b) for a, b in zip(order, _orders(model), strict=True))
    assert ltepass.report(transformed(grouping="auto")).grouping == "identity"


def _orders(model: torch.nn.Module) -> list[Tensor]:
    return [router_of(model, site).permutation.clone() for site in lte_state(model).sites]


@given(rows=st.lists(st.integers(1, 40), min_size=1, max_size=5), d=st.integers(1, 12), offset=st.floats(-50, 50))
def test_running_sums_solve_the_regression_of_all_rows_together(rows: list[int], d: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(sum(rows) + d)
    x = torch.randn(sum(rows), d, generator=generator) + offset  # a mean far from 0, as massive activations have
    y = torch.randn(sum(rows), 3, generator=generator) + 2 * x[:, :1] - offset
    sums = RidgeSums()
    for part in zip(x.split(rows), y.split(rows), strict=True):
        sums.add(*part)
    weight, bias = sums.solve()
    centred = x.double() - x.double().mean(0)
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    expected = torch.linalg.solve(gram, centred.T @ (y.double() - y.double().mean(0))).T
    torch.testing.assert_close(weight.double(), expected, rtol=1e-2, atol=1e-3)
    fitted = y.double().mean(0) + centred @ expected.T
    torch.testing.assert_close((x @ weight.T + bias).double(), fitted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("inputs", ["dense", "hard"])
def test_routers_are_fitted_on_every_token_that_the_model_gives_them(
    monkeypatch: pytest.MonkeyPatch, inputs: Any
) -> None:
    """By hand, from the model as it was before the last fit, in the mode that was asked for."""
    before: list[tuple[Any, str]] = []
    fit = fit_energies

    def keep(model: Any, batches: Any, weights: Any, mode: Any) -> Any:
        before.append((copy.deepcopy(model), mode))
        return fit(model, batches, weights, mode)

    monkeypatch.setattr(initialise, "fit_energies", keep)
    batches = [tokens(8, seed=s) for s in range(4)]
    model = transformed(0.8)
    ltepass.calibrate(model, batches, inputs=inputs)
    assert [mode for _, mode in before] == ["dense", "hard"][: len(before)]
    last, mode = before[-1]
    assert mode == inputs
    seen = router_inputs(last.model, batches, inputs)
    for site in model._lte.sites:
        x = seen[site.name]
        gate, up = (model.get_submodule(n).weight for n in (site.gate, site.up))
        h = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        sums = RidgeSums()
        sums.add(x, log_energy(expert_energy(site, h, down_energy(model, site))))
        expected, own = sums.solve()[0], router_of(model, site).weight
        torch.testing.assert_close(own / own.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-4)


def test_the_sample_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SAMPLE_TOKENS", 64)
    assert {len(s.h) for s in collect(routed(transformed()), [tokens(8, seed=s) for s in range(4)]).values()} == {64}


def test_a_method_is_one_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config's check, the dispatch and what a checkpoint may say read the same table."""
    backwards = Grouping(order=lambda n, cluster, seed: torch.arange(len(n.up)).flip(0), data="unused", doc="reversed")
    with pytest.raises(ConfigError, match="expected one of auto, identity, random, kmeans"):
        ltepass.LTEConfig(grouping="backwards")
    monkeypatch.setitem(GROUPINGS, "backwards", backwards)
    model = dense_model()
    ltepass.transform(model, config=ltepass.LTEConfig(grouping="backwards"))
    site = model._lte.sites[0]
    assert router_of(model, site).permutation.tolist() == list(range(site.d_ff))[::-1]
    assert read_state(write_state(model._lte)).grouping == "backwards"


def test_every_method_has_its_words_on_the_command_line() -> None:
    from typer.testing import CliRunner

    from ltepass.cli import app

    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "400"}).output
    assert AUTO not in GROUPINGS
    assert all(f"{name}: {grouping.doc}" in shown for name, grouping in GROUPINGS.items())
