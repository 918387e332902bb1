"""The benchmark: baselines compute what they claim, decisions are exact, rows are whole, the page shows the CSV."""

from __future__ import annotations

import io
import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from examples.bench import backward, op, op_cases, single_neurons, speed_page, table, tiers, ways, whole_token
from examples.bench.op_cases import CASES, TARGETS, Case
from examples.bench.sparse_codes import NAMES, sparse_codes
from examples.bench.ways import Shape
from examples.results.demo_table import with_table
from ltepass.kernels import reference
from ltepass.kernels.proxy import proxy_scores
from ltepass.measure import machine, timing
from ltepass.measure.records import OpRecord, TokenRecord, append, read
from ltepass.measure.timing import Timing, interleaved
from tests.typed import prefixed, present

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape(tokens=1, d_model=96, d_ff=256, group_size=8)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_token_has_its_own_experts_at_exactly_the_sparsity(
    sparsity: float, dtype: torch.dtype, tokens: int
) -> None:
    shape = replace(TINY, tokens=tokens, dtype=dtype)
    d = ways.decide(shape, sparsity)
    expected = round((1 - sparsity) * shape.n_experts)
    assert d.active.sum(-1).eq(expected).all()
    assert torch.equal(reference.mask(d.x, d.router, None, torch.tensor(0.0)), d.active)
    if tokens > 1 and sparsity > 0:
        assert not torch.equal(d.active[0], d.active[1])
    assert op.union_share(shape, sparsity) == d.active.any(0).float().mean().item()


@pytest.mark.parametrize("gated", [True, False])
def test_every_contender_computes_what_it_claims(gated: bool) -> None:
    shape = replace(TINY, gated=gated)
    weights = ways.make_weights(shape, 2)
    turned = ways.turned_weights(weights)
    w, d = weights[1], ways.decide(shape, 0.5)
    assert torch.equal(w.down, w.down_rows)
    assert w.down.stride() == (1, shape.d_model)

    def masked(active: torch.Tensor) -> torch.Tensor:
        return reference.masked_ffn(d.x, active, w.up, None, w.gate, None, w.down, None, "silu")

    sparse, dense = masked(d.active), masked(torch.ones_like(d.active))
    same: dict[str, tuple[Any, torch.Tensor]] = {
        "routed": (ways.routed(shape, weights, 0.5), sparse),
        "row major": (ways.routed(shape, weights, 0.5, row_major=True), sparse),
        "index_select": (ways.index_select(shape, weights, 0.5), sparse),
        "every expert on": (ways.routed(shape, weights, 0.0), dense),
        "dense eager": (ways.dense_eager(shape, weights), dense),
        "dense upcast": (ways.dense_upcast(shape, weights), dense),
        "single neurons, none dropped": (ways.single_neurons(shape, turned, 0.0), dense),
    }
    if gated:
        same["gate-first, none dropped"] = (ways.gate_first(shape, weights, 0.0), dense)
        a = torch.nn.functional.silu(d.x @ present(w.gate).T)
        keep = a.abs() >= a.abs().flatten().sort(descending=True).values[shape.d_ff // 2 - 1]
        kept = (a * (d.x @ w.up.T) * keep) @ w.down.T
        same["gate-first"] = (ways.gate_first(shape, weights, 0.5), kept)
    h = reference.masked_ffn(d.x, d.active, w.up, None, w.gate, None, torch.eye(shape.d_ff), None, "silu")
    largest = h.abs() >= h.abs().flatten().sort(descending=True).values[round(0.4 * shape.d_ff / 2) - 1]
    same["small units cut"] = (ways.routed(shape, weights, 0.5, hidden=0.6), (h * largest) @ w.down.T)
    for name, (call, expected) in same.items():
        torch.testing.assert_close(call(1), expected, rtol=1e-4, atol=1e-5, msg=prefixed(name))
    for coded, error in (("sparse int8", 0.02), ("sparse int4", 0.2)):
        y: Any = sparse_codes(coded, shape, weights, 0.5)(1)
        assert (y - sparse).norm() < error * sparse.norm()


@pytest.mark.slow
def test_the_compiled_baseline_is_frozen_and_right() -> None:
    weights = ways.make_weights(TINY, 2)
    with torch.no_grad():
        eager, compiled = ways.dense_eager(TINY, weights), ways.dense_compiled(TINY, weights)
        for i in range(2):
            torch.testing.assert_close(compiled(i), eager(i), rtol=1e-4, atol=1e-5)


def test_turns_are_interleaved() -> None:
    calls: list[tuple[str, int]] = []
    both = {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}
    timings = interleaved(both, seconds=1e9, max_repeats=5)
    assert timings["a"].repeats == timings["b"].repeats == 5
    names = [name for name, _ in calls]
    assert names == ["a", "a", "b"] * 7  # two turns of warm-up; one untimed call begins each turn
    assert calls[1] != calls[4]  # another copy of the weights


def test_a_slow_contender_sits_out_and_its_first_turns_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls: list[str] = []

    def contender(name: str, seconds: float) -> Any:
        def call(i: int) -> None:
            calls.append(name)
            clock[0] += seconds

        return call

    sides = {"slow": contender("slow", 8.0), "fast": contender("fast", 0.5)}
    timings = interleaved(sides, seconds=10.0, min_repeats=4)
    assert timings["slow"].repeats == 2
    assert timings["fast"].repeats == 4
    assert calls[:3] == ["slow", "slow", "fast"]
    assert calls.count("slow") == 3


def test_quantiles_are_of_the_sorted_times() -> None:
    t = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (t.p20, t.median, t.p80, t.repeats) == (2.0, 3.0, 5.0, 5)


@pytest.fixture
def tiny_case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case that takes no time; nothing is compiled."""
    case = Case(name="7b-fp32-1", shape=TINY, threads=1, peers=True)
    monkeypatch.setattr(op, "CASES", (case,))
    monkeypatch.setattr(table, "CASES", (case,))
    # 50 MB in 50 ms, or in 5 ms by the better way
    reads = {"worse": lambda _: time.sleep(0.05), "better": lambda _: time.sleep(0.005)}
    monkeypatch.setattr(op, "plain_reads", lambda: (reads, 50_000_000))
    monkeypatch.setattr(op, "gemm_rate", lambda: 50e9)
    monkeypatch.setattr(ways, "dense_compiled", ways.dense_eager)
    return case


def program() -> typer.Typer:
    """`python -m examples.bench.op`, in this process."""
    app = typer.Typer()
    app.command()(op.main)
    return app


def test_the_command_appends_whole_rows_and_draws(tiny_case: Case, tmp_path: Path) -> None:
    out, plot = tmp_path / "op.csv", tmp_path / "op.svg"
    common = ["7b-*", "--out", str(out), "--seconds", "1", "--repeats", "2"]
    for more in (["--plot", str(plot)], ["--json"]):
        result = CliRunner().invoke(program(), [*common, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    records = read(out, OpRecord)
    assert len(json.loads(result.stdout)["rows"]) == len(records) / 2
    names = {(r.contender, r.sparsity) for r in records}
    assert {("dense eager", 0.0), ("dense compiled", 0.0), ("index_select", 0.9), ("gate-first", 0.5)} <= names
    assert {s for name, s in names if name == "routed"} == set(op_cases.SPARSITIES)
    for coded in NAMES:
        assert {s for name, s in names if name == coded} == set(op_cases.CODED_SPARSITIES) >= {0.5, 0.75, 0.9}
    assert len(records) == 2 * len(names)
    for r in records:
        assert all(getattr(r, f.name) not in ("", None) for f in fields(r) if f.name not in ("path", "case"))
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms
        assert bool(r.path) == (r.contender == "routed")
    routed = next(r for r in records if (r.contender, r.sparsity) == ("routed", 0.5))
    assert 1.1 < routed.bandwidth_gbs < 10  # of the reads that took turns
    weight_bytes = 3 * 96 * 256 * 4
    router_bytes = 32 * 96 * 4
    per_ms = 1e6 * routed.bandwidth_gbs
    assert routed.byte_ideal_ms == pytest.approx((weight_bytes / 2 + router_bytes) / per_ms, rel=1e-3)
    cats = next(r for r in records if (r.contender, r.sparsity) == ("gate-first", 0.5))
    for coded, bytes_of_a_weight in (("sparse int8", 1), ("sparse int4", 4.5 / 8)):
        r = next(r for r in records if (r.contender, r.sparsity) == (coded, 0.5))
        ideal = (weight_bytes / 4 * bytes_of_a_weight / 2 + router_bytes / 4) / per_ms
        assert r.byte_ideal_ms == pytest.approx(ideal, rel=1e-3)
    call = next(r for r in records if r.contender == op_cases.CALL)
    assert call.byte_ideal_ms == call.bound_ms == 0
    assert cats.byte_ideal_ms == pytest.approx(weight_bytes * 2 / 3 / (1e6 * cats.bandwidth_gbs), rel=1e-3)
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_whole_tokens_are_exported_in_codes_at_both_sparsities(format: str) -> None:
    for model in whole_token.MODELS:
        options = model.exports()
        for sparsity in ("0.5", "0.8"):
            wanted = ["gated", "--linears", format, "--dtype", model.dtypes[0], "--sparsity", sparsity]
            assert options[f"{format}-{sparsity}"] == wanted


def test_a_case_that_does_not_exist_is_refused(tiny_case: Case, tmp_path: Path) -> None:
    from ltepass.errors import ConfigError

    with pytest.raises(ConfigError, match="no case matches 'nothing-\\*'"):
        CliRunner().invoke(program(), ["nothing-*"], catch_exceptions=False)
    listed = CliRunner().invoke(program(), ["--list"]).output
    assert "7b-fp32-1: T=1, 96 x 256, fp32, 1 thread" in listed


def record(contender: str, sparsity: float, ms: float, ideal: float, **more: Any) -> OpRecord:
    """A made-up measurement of the case 7b-fp32-1."""
    values: dict[str, Any] = {
        f.name: {"int": 1, "float": 1.0, "bool": True, "str": "x"}[str(f.type)] for f in fields(OpRecord)
    }
    values |= {"case": "7b-fp32-1", "contender": contender, "sparsity": sparsity, "run": "2026-01-01"}
    values |= {"median_ms": ms, "byte_ideal_ms": ideal, "bound_ms": ideal}
    return OpRecord(**values | more)


def test_verdicts_follow_the_newest_run_and_the_best_baseline() -> None:
    run = [
        record("dense eager", 0.0, 12.0, 10.0),
        record("dense compiled", 0.0, 10.0, 10.0),
        record("routed", 0.5, 5.2, 5.0),
        record("routed", 0.75, 4.0, 2.5),
    ]
    older = [replace(r, run="2025-01-01", median_ms=1.0) for r in run]
    target = TARGETS[0]
    assert target.of_ideal
    half, three_quarters, missing = table.judge(target, table.latest([*run, *older])["7b-fp32-1"])
    assert missing is None
    assert half is not None
    assert half.value == pytest.approx((10 / 5.2) / 2)
    assert half.met
    assert half.ceiling == pytest.approx(1.0)
    assert three_quarters is not None
    assert three_quarters.value == pytest.approx((10 / 4) / 4)
    assert not three_quarters.met
    shown = table.markdown(run, [])
    assert "| 0.96 / 0.62 / - | 1.00 / 1.00 / - | not measured |" in shown
    shown = table.markdown([*run, record("routed", 0.9, 1.2, 1.0)], [])
    assert "| 0.96 / 0.62 / 0.83 | 1.00 / 1.00 / 1.00 | no |" in shown
    shown = table.markdown([*run, record("routed", 0.0, 20.0, 10.0)], [])
    assert "1 thread (worst of 1 measured, 1 below the target) | >= 0.95x | 0.60 / - / -x" in shown
    assert "Whole token against the byte ideal and llama.cpp: not measured." in shown


def test_rows_below_their_targets_say_where_the_time_goes() -> None:
    run = [
        record("dense eager", 0.0, 60.0, 50.0),
        record("routed", 0.5, 30.0, 25.0, union=0.5),
        record("routed", 0.75, 20.0, 12.5, union=0.25, bandwidth_gbs=11.0),
    ]
    missed = "| T=1, 4096 x 11008, fp32, 1 thread, 75% (25% of the experts) | 20.00 |"
    shown = table.markdown(run, [])
    assert f"{missed} not measured | 135.3 | not measured | 11.0 | 60.00, 9.0 |" in shown
    assert "fp32, 1 thread, 50% (" not in shown  # that one is met
    shown = table.markdown([*run, record("routed", 1.0, 1.0, 0.1)], [])
    assert f"{missed} 1.00 | 135.3 | 7.1 | 11.0 | 60.00, 9.0 |" in shown
    met = [run[0], replace(run[1], median_ms=25.0)]
    assert "below the target |" not in table.markdown(met, []).split("Measured on")[1]


def test_targets_name_cases_that_exist_and_measure_what_they_need() -> None:
    known = {case.name: case for case in CASES}
    for target in TARGETS:
        assert len(target.values) == len(target.at)
        assert set(target.at) <= set(op_cases.SPARSITIES)
        assert set(target.cases) <= known.keys()
    assert len(known) == len(CASES)


def test_records_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [record("routed", s, 1.25, 0.5, gated=s > 0.5) for s in (0.5, 0.75)]
    append(path, rows[:1])
    append(path, rows[1:])
    assert read(path, OpRecord) == rows
    assert read(tmp_path / "none.csv", TokenRecord) == []


def test_the_backward_table_has_its_columns() -> None:
    shape = (32, 64, 8, 40)
    timings = interleaved(backward.contenders(*shape, 0.5), seconds=0.0, min_repeats=1)
    assert len(timings) == 4
    assert backward.line(shape, 0.5, timings).startswith("| 32 x 64, 8, 40 | 50% | ")


def test_the_page_shows_the_kept_measurements() -> None:
    text = (ROOT / speed_page.PAGE).read_text()
    shown = with_table(text, speed_page.section(ROOT), speed_page.BEGIN, speed_page.END)
    assert shown == text, "run `python -m examples.bench.speed_page`"


def test_single_neurons_have_a_row_for_each_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(single_neurons.SHAPES, "small", (64, 96))
    for module in (timing, machine):
        monkeypatch.setattr(module, "last_level_cache", lambda: 1 << 16)
    monkeypatch.setattr(single_neurons, "gemm_rate", lambda: 1e9)
    rows = tmp_path / "rows.csv"
    threads = torch.get_num_threads()
    single_neurons.main(["--shapes", "small", "--threads", "1", "--seconds", "0", "--out", str(rows)])
    assert torch.get_num_threads() == threads
    records = read(rows, single_neurons.NeuronRecord)
    assert [(r.dtype, r.active) for r in records] == [
        (dtype, share) for dtype in ("float32", "bfloat16") for share in single_neurons.ACTIVE
    ]
    assert all(r.scan_ms > 0 and r.scan_share > 0 for r in records)
    assert len(single_neurons.markdown(records).splitlines()) == 2 + len(records)


def test_tiers_have_a_row_for_each_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(single_neurons.SHAPES, "small", (64, 96))
    for module in (timing, machine, tiers):
        monkeypatch.setattr(module, "last_level_cache", lambda: 1 << 16)
    monkeypatch.setattr(tiers, "gemm_rate", lambda: 1e9)
    rows = tmp_path / "rows.csv"
    tiers.main(["--shapes", "small", "--threads", "1", "--seconds", "0", "--out", str(rows)])
    records = read(rows, tiers.TiersRecord)
    assert [(r.p, r.q) for r in records] == list(tiers.POINTS)
    assert all(min(r.packed_us, r.planes_us, r.int8_us, r.int4_us, r.share) > 0 for r in records)
    assert len(tiers.markdown(records).splitlines()) == 2 + len(records)


@pytest.mark.parametrize(("p", "q"), tiers.POINTS)
def test_the_bench_of_tiers_computes_the_same_in_both_forms(p: float, q: float) -> None:
    layer = tiers.layer(64, 96, torch.randn(1, 64))
    planes, packed = layer.of_planes(p, q)(), layer.of_packed(p, q)()
    assert (planes - packed).abs().max() <= 1e-5 * planes.abs().max()
    scores = proxy_scores(layer.x, *layer.planes.high, None, layer.sizes, *layer.router(), "silu")
    assert abs(float((scores > layer.threshold(p)).float().mean()) - p) <= 0.02


@pytest.mark.parametrize("experts", [12, 96])
@pytest.mark.parametrize("share", single_neurons.ACTIVE)
def test_the_bench_of_single_neurons_chooses_and_stores_what_it_says(experts: int, share: float) -> None:
    (weights,) = ways.make_weights(ways.Shape(tokens=1, d_model=64, d_ff=96, group_size=1), 1)
    x = torch.randn(1, 64)
    chosen = single_neurons.choose(x, single_neurons.proxy_of(weights), experts, share)
    router = (*chosen.proxy, chosen.weight, chosen.bias, torch.tensor(0.0))
    results = []
    for w in (weights, single_neurons.stored(weights)):
        y, _, active = torch.ops.ltepass.routed_proxy_ffn_with_mask(
            x, *router, w.up, None, w.gate, None, w.down, None, "silu"
        )
        assert active == round(share * experts)
        results.append(y)
    assert torch.equal(*results)


def test_the_table_of_the_op_fits_a_terminal_of_80_columns() -> None:
    records = read(ROOT / "examples/results/bench_op.csv", OpRecord)
    console = Console(width=80, file=io.StringIO())
    console.print(table.op_table(records))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines), "nothing is cut off"
    head = " ".join(" ".join(lines[:3]).split())
    assert {"case", "contender", "sparsity", "ideal", "bound,"} <= set(head.split())
