"""The comparison commands on a model and budget of seconds: every cell runs, rows resume, tables come from rows."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import ltepass
from examples.compare import (
    ablations,
    choose_cuts,
    frontier,
    interval_workshop,
    missed_energy,
    models,
    presets,
    start_cost,
    step_time,
    tasks,
    workshop,
)
from examples.compare.cuts import Cuts, expert_sparsity, measure_cut, n_matrices
from examples.compare.frontier_rows import Rows
from examples.compare.measured import measure_lte
from examples.compare.study import load_data
from examples.compare.tuning import tune_dense
from ltepass.corpora import corpora
from ltepass.measure.quality import perplexity
from ltepass.measure.sparsity import sparsity_curve
from ltepass.routed.routed import routers_of
from tests.training.learning_cases import copied_text, trained


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "TINY_STEPS", 8)
    budget = dataclasses.replace(
        presets.PRESETS["smoke"].budget, steps=4, batch=4, length=64, test=1, test_length=64, calibration=8
    )
    preset = dataclasses.replace(presets.PRESETS["smoke"], budget=budget, points=(0.5,), trained_points=(0.5,))
    monkeypatch.setitem(presets.PRESETS, "smoke", preset)


def run_frontier(folder: Path, work: Path, **kwargs: Any) -> list[dict[str, str]]:
    options = {"preset": "smoke", "texts": None, "only": "", "points": "", "minutes": 1e9, **kwargs}
    frontier.main(results=folder / "frontier", work=work, **options)
    with (folder / "frontier.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_frontier_has_a_row_for_every_method_and_text_and_goes_on_where_it_stopped(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = run_frontier(tmp_path, shared, only="dense,lte")
    rows = run_frontier(tmp_path, shared)
    assert rows[: len(some)] == some  # nothing was measured twice
    methods = {"dense-untuned", "dense", *presets.OURS, *presets.TRAINED, *presets.POST_HOC}
    domains = {"reference": "training", "docstrings": "training", "source": "training"}
    domains |= {"graph theory": "outside", "C++": "outside"}
    assert {(r["method"], r["text"], r["domain"]) for r in rows} == {(m, *t) for m in methods for t in domains.items()}
    for row in rows:
        target = float(row["target_sparsity"])
        # thresholds were set on a few tokens of other text
        assert float(row["ffn_sparsity"]) == pytest.approx(target, abs=0.12 if row["domain"] == "training" else 0.3), (
            row
        )
        assert float(row["perplexity"]) > 1
        assert row["measured_tokens"] == str(8 * 64)
        assert 0 < float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    dense = [[float(r["ratio"]) for r in rows if r["method"] == method] for method in ("dense", "dense-untuned")]
    assert [min(pair) for pair in zip(*dense, strict=True)] == [1.0] * len(domains)  # the better one on each text
    assert all(max(ratios) > 1 for ratios in dense[1:])
    tuned = {r["text"]: float(r["perplexity"]) for r in rows if r["method"] == "dense"}
    assert all(float(r["perplexity"]) != tuned[r["text"]] for r in rows if r["method"] != "dense")
    table = (tmp_path / "frontier.md").read_text()
    assert all(m in table for m in methods - {"dense", "dense-untuned"})
    assert "oracle (not deployable)" in table
    assert "| method | sparsity | docstrings | reference | source | C++ (outside) | graph theory (outside) |" in table
    assert (tmp_path / "frontier.svg").read_text().startswith("<?xml")
    monkeypatch.setattr(frontier.Frontier, "run", None)  # all cells are there
    assert run_frontier(tmp_path, shared) == rows


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_starts_are_timed_on_the_same_tokens_and_only_their_own_rows_are_replaced(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    order: list[str] = []
    for name, begin in start_cost.STARTS.items():

        def keep(model: Any, batches: Any, sparsity: float, name: str = name, begin: Any = begin) -> Any:
            assert {r.mode for r in routers_of(model)} == {"dense"}
            seen.setdefault(name, []).append(torch.cat(batches))
            order.append(name)
            return begin(model, batches, sparsity)

        monkeypatch.setitem(start_cost.STARTS, name, keep)
    options: dict[str, Any] = {"texts": None, "tokens": "256,512", "results": tmp_path / "s", "work": shared}
    start_cost.main(preset="smoke", points="0.5,0.8", **options)
    assert [b.numel() for b in seen["moefication"]] == [256, 512, 256, 512]
    for given in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(given, seen["moefication"], strict=True))
    assert set(order[::4]) == set(start_cost.STARTS)  # each goes first once
    rows = Rows(tmp_path / "s.csv").read()
    assert len(rows) == 4 * 2 * 2 * 3
    assert all(float(r["seconds"]) > 0 and float(r["ratio_to_dense"]) > 0.9 for r in rows)
    table = (tmp_path / "s.md").read_text()
    assert all(f"| {name} | {count} |" in table for name in start_cost.STARTS for count in (256, 512))
    with pytest.raises(ValueError, match="was to get 300 tokens; expected blocks of 64"):
        start_cost.main(preset="smoke", points="0.5", **options | {"tokens": "512,300"})
    start_cost.main(preset="smoke", points="0.5", **options | {"tokens": "512"})
    again = Rows(tmp_path / "s.csv").read()
    assert len(again) == len(rows)
    assert again[:-12] == [r for r in rows if (r["sparsity"], r["tokens"]) != ("0.5", "512")]


@pytest.mark.usefixtures("quick")
def test_one_checkpoint_is_measured_at_the_other_points(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = dataclasses.replace(presets.PRESETS["smoke"], points=(0.5, 0.8))
    monkeypatch.setitem(presets.PRESETS, "smoke", preset)
    run_frontier(tmp_path, shared, only="dense,lte+cuts", points="0.5")
    monkeypatch.setattr(frontier, "tune_lte", None)  # no more training
    rows = run_frontier(tmp_path, shared, only=presets.ONE_CHECKPOINT)
    at = {r["target_sparsity"]: float(r["ffn_sparsity"]) for r in rows if r["method"] == presets.ONE_CHECKPOINT}
    assert at == {"0.8": pytest.approx(0.8, abs=0.12)}


@pytest.mark.usefixtures("quick")
def test_ablations_and_tasks_write_their_rows(tmp_path: Path, shared: Path) -> None:
    common: dict[str, Any] = {"preset": "smoke", "texts": None, "work": shared, "seeds": 1}
    oracle = "an oracle's experts, no warm start"
    chosen = {"stages": "both, warm start", "routers": "random, frozen", "group size": "64", "start": oracle}
    for only, variant in chosen.items():
        ablations.main(results=tmp_path / "a", only=only, variant=variant, sparsity=0.5, minutes=9.0, **common)
    rows = ablations.read_rows(tmp_path / "a.csv")
    assert [r["variant"] for r in rows] == list(chosen.values())
    ratios_of = {r["variant"]: float(r["ratio"]) for r in rows}
    assert ratios_of[oracle] < ratios_of["random, frozen"]
    assert all(float(r["ratio"]) > 0 for r in rows)
    assert "| group size | 64 |" in (tmp_path / "a.md").read_text()
    tasks.main(results=tmp_path / "t", points="0,0.5", **common)
    rows = tasks.read_rows(tmp_path / "t.csv")
    assert [(r["task"], r["target"]) for r in rows] == [
        (t, p) for t in ("instructions", "classification") for p in ("0", "0.5")
    ]
    assert all(abs(float(r["ffn_sparsity"]) - float(r["target"])) < 0.12 for r in rows)


@pytest.mark.usefixtures("quick")
def test_cuts_are_chosen_without_a_look_at_test_text(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_test = load_data
    without = lambda *args: dataclasses.replace(with_test(*args), test={}, measured={})  # noqa: E731
    monkeypatch.setattr(interval_workshop, "load_data", without)
    monkeypatch.setattr(choose_cuts, "HIDDEN", (0.0, 0.5))
    monkeypatch.setattr(choose_cuts, "INPUTS", (0.0, 0.3, 0.8))
    choose_cuts.main(preset="smoke", texts=None, work=shared, sparsity=0.5)
    out = capsys.readouterr().out
    table = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith(("| 0%", "| 30%", "| 80%"))]
    alone, both, impossible = (dict(zip(("0%", "50%"), row[1:], strict=False)) for row in table)
    assert not any(impossible.values())  # 80 % of inputs alone is more than the 50 % asked for
    assert len({*alone.values(), *both.values()}) == 4  # every pair gives another model
    values = {
        f"{h} of hidden units, {i} of inputs": float(row[h]) for i, row in (("0%", alone), ("30%", both)) for h in row
    }
    best = min(values, key=values.__getitem__)
    assert f"Least of both: {best}, {values[best]:.2f}." in out


@pytest.mark.usefixtures("quick")
def test_energy_missed_is_least_with_an_oracle_and_most_without_a_router(tmp_path: Path, shared: Path) -> None:
    missed_energy.main(preset="smoke", texts=None, results=tmp_path / "m", work=shared, sparsity=0.5, sites=2)
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    sites = dict.fromkeys(r["site"] for r in rows)
    by_site = [[float(r["missed"]) for r in rows if r["site"] == site] for site in sites]
    for oracle, mlp, linear, same in by_site:
        assert 0 < oracle < min(mlp, linear)
        assert linear < same
    # Good groups leave little to choose in some layers: how much routing helps is judged over all of them.
    _, _, linear, same = map(sum, zip(*by_site, strict=True))
    assert linear < 0.8 * same
    scores, energy = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([[1.0, 3.0], [1.0, 4.0]])
    assert missed_energy.missed(scores, energy, 0.5) == pytest.approx((1 / 4 + 4 / 5) / 2)
    assert "| oracle |" in (tmp_path / "m.md").read_text()


@pytest.mark.parametrize("cuts", [Cuts(hidden=0.25), Cuts(inputs=0.4), Cuts(hidden=0.6, inputs=0.3)])
def test_cuts_leave_out_small_inputs_and_the_small_hidden_units_of_active_experts(cuts: Cuts) -> None:
    model, text = trained(), copied_text(8, seed=3)
    ltepass.set_mode(model, "hard")
    plain = model(text).logits
    cuts.apply(model, (text,))
    found = measure_cut(model, {"t": text})["t"]
    assert not torch.equal(model(text).logits, plain)
    without = measure_lte(model, {"t": text})["t"]
    matrices = n_matrices(model._lte.sites[0])
    active, own = 1 - without.sparsity, without.bytes_share - (1 - without.sparsity)
    assert 1 - found.sparsity == pytest.approx(active * cuts.kept(matrices), rel=0.03)
    assert found.bytes_share == pytest.approx(1 - found.sparsity + own)
    experts = expert_sparsity(matrices, 0.7, cuts)
    assert (1 - experts) * cuts.kept(matrices) == pytest.approx(0.3)
    ltepass.set_hidden_sparsity(model, 0.0, [])
    ltepass.set_input_sparsity(model, 0.0, [])
    assert torch.equal(model(text).logits, plain)
    assert found.perplexity() > 1


@pytest.mark.usefixtures("quick")
def test_instructions_are_learned_from_answers_only() -> None:
    budget = presets.PRESETS["smoke"].budget
    task = tasks.instruction_task(models.tokenizer("tiny"), budget, 0)
    row = task.train[0]
    counted = row["labels"] != tasks.IGNORED
    text = bytes(row["input_ids"][~counted].tolist()).decode()
    assert text.startswith("<user>What does the Python")
    assert counted.any()
    assert torch.equal(row["input_ids"][counted], row["labels"][counted])
    questions = [{bytes(r["input_ids"][:60].tolist()) for r in rows} for rows in (task.train, task.test)]
    assert len(questions[0]) > 1


@pytest.mark.usefixtures("quick")
def test_a_training_whose_gradients_overflow_gives_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workshop.Workshop("smoke", presets.PRESETS["smoke"].budget, None, tmp_path)
    model = work.base()
    forward = model.forward

    def scaled(input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
        """The same loss with a gradient 1e30 times as large."""
        out = forward(input_ids=input_ids, labels=labels, **more)
        out.loss = out.loss.detach() + 1e30 * (out.loss - out.loss.detach())
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(ValueError, match=r"gradient norms were .*inf"):
        tune_dense(model, work.data(0), work.budget, tmp_path / "log", 0)


def test_step_time_takes_turns_and_trains(tmp_path: Path) -> None:
    model = trained().train()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    times = step_time.measure(model, copied_text(2, 1).chunk(2), repeats=2)
    assert {side: len(t) for side, t in times.items()} == dict.fromkeys(step_time.SIDES, 2)
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.usefixtures("quick")
def test_texts_outside_the_domain_are_named_on_the_command_line(tmp_path: Path, shared: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a miller who had three sons. " * 60)
    rows = run_frontier(tmp_path, shared, only="dense", other=[f"a story={story}"])
    assert {r["text"]: r["domain"] for r in rows if r["domain"] == "outside"} == {"a story": "outside"}
    blocks = models.tokenizer("tiny")(story.read_text())["input_ids"][: 8 * 64]
    tuned: Any = models.load(str(shared / "dense-smoke-0"), shared)
    (row,) = (r for r in rows if r["text"] == "a story")
    first = torch.tensor(blocks).view(8, 64)[:1]  # the budget's test blocks
    assert float(row["perplexity"]) == pytest.approx(perplexity(tuned, first), rel=1e-3)
    with pytest.raises(typer.BadParameter, match=r"--other is 'story.txt' and ''; expected NAME=PATH"):
        run_frontier(tmp_path, shared, other=["story.txt"])
    story.write_text("short")
    with pytest.raises(ValueError, match="a story: shorter than a block of 64 tokens"):
        run_frontier(tmp_path / "new", shared, only="dense", other=[f"a story={story}"])


def test_one_checkpoint_gives_a_curve_and_keeps_its_thresholds() -> None:
    model, blocks = trained(), copied_text(8, 2)
    ltepass.set_mode(model, "hard")
    thresholds = [r.threshold.clone() for r in routers_of(model)]
    curve = list(sparsity_curve(model, blocks, (0.0, 0.3, 0.6, 0.9)))
    assert [s for s, _, _ in curve] == [0.0, 0.3, 0.6, 0.9]
    assert all(measured == pytest.approx(s, abs=0.04) for s, _, measured in curve)
    values = [value for _, value, _ in curve]
    assert values == sorted(values)
    ltepass.set_mode(model, "dense")
    assert values[0] == pytest.approx(perplexity(model, blocks))
    assert all(torch.equal(r.threshold, t) for r, t in zip(routers_of(model), thresholds, strict=True))


def test_test_slices_are_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(20_000)))
    for folder in (tmp_path, None):
        for train, test in corpora(folder, 40_000, 4_000).values():
            assert len(test) >= 1_000
            lines = [line for line in test.splitlines() if len(line) > 60] or test.splitlines()[1:-1]
            assert sum(line in train for line in lines) < 0.05 * len(lines)
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt file"):
        corpora(tmp_path / "none", 1, 1)
