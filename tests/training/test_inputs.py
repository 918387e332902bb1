"""What Trainer takes besides a model and a data set: `model_init`, several evaluation sets, streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, integrations

import ltepass
from ltepass.routed.routed import routers_of
from ltepass.training.settings import LTESettings
from ltepass.training.stages import stage_options
from ltepass.training.trainer import HELD_OUT, LTETrainer
from tests.training.learning_cases import copied_text, trained

BOTH = LTESettings(soft_steps=2, hard_steps=2)


def rows(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": a, "labels": a} for a in copied_text(n, seed)]


def trainer(folder: Path, lte: LTESettings = BOTH, **kwargs: Any) -> LTETrainer:
    options = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "max_steps": 2,
        "learning_rate": 3e-3,
        **kwargs.pop("options", {}),
    }
    given = {"train_dataset": rows(32, 1), "eval_dataset": rows(8, 2), "lte": lte, **kwargs}
    return LTETrainer(args=TrainingArguments(str(folder), **options), **given)


def test_both_stages_of_a_fit_train_the_model_that_model_init_makes(tmp_path: Path) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(trained())
        return made[-1]

    t = trainer(tmp_path / "init", model_init=make)
    t.fit()
    assert len(made) == 2  # Trainer's own beginning, and one for the fit
    assert t.model is t.lte_model is made[-1]
    assert {entry["epoch"] for entry in t.state.log_history} == {2 / 8}
    assert {r.mode for r in routers_of(made[-1])} == {"hard"}
    t.fit()
    assert len(made) == 3
    for name, value in made[-2].state_dict().items():
        assert torch.equal(made[-1].state_dict()[name], value), name


def test_a_model_of_model_init_learns_what_one_that_is_given_learns(tmp_path: Path) -> None:
    once = LTESettings(soft_steps=2, hard_steps=0)
    built, given = (
        trainer(tmp_path / "a", once, model_init=lambda: trained()),
        trainer(tmp_path / "b", once, model=trained()),
    )
    for t in (built, given):
        t.fit()
    for name, value in given.model.state_dict().items():
        assert torch.equal(built.model.state_dict()[name], value), name


def test_a_trial_gets_a_model_a_teacher_and_a_controller_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrations, "hp_params", dict)  # which knows the trials of optuna, ray and wandb only
    trials: list[Any] = []

    def make(trial: Any) -> Any:
        trials.append(trial)
        return trained()

    t = trainer(tmp_path, LTESettings(distill=0.5, eta=0.3), model_init=make)
    first = (t.model, t.teacher)
    t.controller.eta = 7.0
    t.train(trial={"learning_rate": 1e-3})
    assert trials == [None, {"learning_rate": 1e-3}]
    assert t.model is t.lte_model is not first[0]
    assert t.teacher is not first[1]
    assert t.controller.eta != 7.0


def test_a_stage_is_settled_on_every_evaluation_set_in_turn(tmp_path: Path) -> None:
    sets = {"wiki": rows(80, 2), "code": rows(8, 3)}
    t = trainer(tmp_path, model=trained(), eval_dataset=sets, options={"eval_strategy": "steps", "eval_steps": 1})
    t.fit()
    assert {"eval_wiki_loss", "eval_code_loss"} <= {key for entry in t.state.log_history for key in entry}
    batches = [b["input_ids"] for b in t._held_out()]
    assert len(batches) == HELD_OUT
    expected = [sets["wiki"][:4], sets["code"][:4], sets["wiki"][4:8], sets["code"][4:], sets["wiki"][8:12]]
    for batch, part in zip(batches, expected, strict=False):
        assert torch.equal(batch, torch.stack([row["input_ids"] for row in part]))


def test_each_of_many_evaluation_sets_is_seen(tmp_path: Path) -> None:
    sets = {str(i): rows(4, i) for i in range(HELD_OUT + 3)}
    assert len(trainer(tmp_path, model=trained(), eval_dataset=sets)._held_out()) == HELD_OUT + 3


class Stream(IterableDataset[dict[str, Tensor]]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(rows(self.n, 4))


@pytest.mark.parametrize("given", [Stream(40), {"a": Stream(4), "b": rows(4, 2)}, {}, None])
def test_streams_and_no_evaluation_set_at_all(tmp_path: Path, given: Any) -> None:
    t = trainer(tmp_path, model=trained(), train_dataset=Stream(64), eval_dataset=given)
    t.fit()
    assert sum(ltepass.measure_sparsity(t.model, t._held_out()).values()) / 2 == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("settings", [{}, {"trainable": "lora"}, {"through_op": True, "soft_steps": 0}])
def test_training_that_stops_midway_leaves_modes_flags_and_modules_as_before(
    tmp_path: Path, error: Any, settings: Any
) -> None:
    """What was learned until then stays."""
    model = trained()
    model.lm_head.weight.requires_grad_(False)
    kinds = {n: type(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    class Stops(LTETrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1:
                raise error
            return super().training_step(*args, **kwargs)

    args = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, learning_rate=3e-3,
    )  # fmt: skip
    t = Stops(model=model, args=args, train_dataset=rows(32, 1), lte=LTESettings(**settings))
    with pytest.raises(error):
        t.fit()
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {r.mode for r in routers_of(model)} == {"dense"}
    assert not any(r.recorder.count_inactive or r.plan for r in routers_of(model))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_exit_of_a_stage_is_finished_whatever_fails_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltepass.training import stages as options

    model = trained()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    def unlower(model: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(options, "unlower", unlower)
    with pytest.raises(MemoryError), stage_options(model, LTESettings(through_op=True), "hard"):
        pass
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
