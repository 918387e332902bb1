"""examples/compare/quantise_prune_route: the rows, and what beats what."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from examples.compare import quantise_prune_route as study
from examples.compare import quantise_prune_route_page as pages
from examples.compare.quantise_prune_route_page import Kind, Row
from ltepass.measure.quality import Ratio
from tests.models import zoo


def row(kind: Kind, method: str, ratio: float, ms: float, resident_mb: float) -> Row:
    ratios = {text: Ratio(value=ratio, low=round(ratio - 0.01, 3), high=round(ratio + 0.01, 3)) for text in pages.TEXTS}
    times = {n: (ms / n, ms / n - 1, ms / n + 1) for n in pages.THREADS}
    return Row(kind=kind, method=method, ratios=ratios, ms=times, read_mb=9.0, resident_mb=resident_mb, tokens=64)


ROWS = [
    row("quantised", "dense, F32", 1.0, 20.0, 500.0),
    row("quantised", "dense, int8", 1.004, 6.0, 150.0),
    row("llama.cpp", "llama.cpp Q4_0", 1.3, 5.0, 90.0),
    row("routed", "proxies, int8", 1.05, 5.5, 200.0),
    row("tiers", "tiers, int8", 1.02, 6.5, 100.0),
]


@pytest.mark.parametrize(
    ("method", "threads", "other"),
    [
        ("proxies, int8", 1, None),
        ("proxies, int8", None, "dense, int8"),
        ("tiers, int8", 1, "dense, int8"),
        ("tiers, int8", None, None),
    ],
)
def test_a_point_is_beaten_by_what_is_no_worse_and_costs_no_more(
    method: str, threads: int | None, other: str | None
) -> None:
    mine = next(r for r in ROWS if r.method == method)
    found = pages.beaten_by(mine, ROWS, threads)
    assert (None if found is None else found.method) == other


def test_the_page_and_the_plot_are_made_from_the_rows_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "rows.csv"
    pages.write(out, ROWS)
    back = pages.read(out)
    assert back == ROWS
    text = out.with_suffix(".md").read_text()
    assert text == pages.page(back)
    assert "| routed | proxies, int8 | x1.050 | no | no | by dense, int8 |" in text
    pages.draw(back, tmp_path / "rows.svg")
    assert "proxies, int8" in (tmp_path / "rows.svg").read_text()


def test_rows_without_times_are_no_points_of_the_page(tmp_path: Path) -> None:
    untimed = Row(kind="routed", method="proxies, F32", ratios=ROWS[0].ratios)
    pages.write(tmp_path / "rows.csv", [untimed])
    assert "No times yet." in (tmp_path / "rows.md").read_text()
    (back,) = pages.read(tmp_path / "rows.csv")
    assert not back.ms
    assert math.isnan(back.resident_mb)


def test_pruned_to_all_of_its_neurons_a_model_is_itself_and_to_half_it_keeps_those_that_write_most() -> None:
    dense = zoo.llama(intermediate_size=192)
    ids = zoo.ids(2, 16)
    whole = study.pruned(dense, [ids], 0.0)
    assert zoo.logits(whole).equal(zoo.logits(dense))
    half = study.pruned(dense, [ids], 0.5)
    energy = study.written_by_neuron(dense, [ids])
    for layer, small, written in zip(dense.model.layers, half.model.layers, energy, strict=True):
        most = written.topk(96).indices.sort().values
        assert small.mlp.down_proj.weight.equal(layer.mlp.down_proj.weight[:, most])


def test_hooks_that_watch_come_off_where_a_forward_fails() -> None:
    dense = zoo.llama()
    with pytest.raises(IndexError):
        study.written_by_neuron(dense, [torch.full((1, 3), zoo.VOCAB)])  # no such token
    assert not any(module._forward_pre_hooks for module in dense.modules())
