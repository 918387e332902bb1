"""The gallery: each example at a small size on data made here, its packages' data where they are, and its page."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import ltepass
from examples.gallery import page
from examples.gallery.dense_and_routed import Options, Task, compare, lowered_equal
from examples.gallery.rows import PATH, Row, keep, read

FOLDER = PATH.parent
EXAMPLES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
SMALL = Options(dense=2, soft=1, hard=1, batch=2, targets=(0.5,), routers=("linear",), seeds=(0,))


def module(name: str) -> Any:
    return import_module(f"examples.gallery.{next(stem for stem in EXAMPLES if stem.endswith(name))}")


def images_task() -> Task:
    vit, images = module("digits_vit"), torch.rand(40, 1, 8, 8)
    task: Task = vit.task(images, torch.arange(40) % 10, 0, SMALL, vit.split(40, 0, 10, 10))
    return task


@pytest.fixture(autouse=True)
def versions_are_not_asked_of_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXAMPLES:
        monkeypatch.setattr(
            import_module(f"examples.gallery.{name}"), "here", lambda *_: {"machine": "", "versions": ""}
        )


def test_dense_and_routed_have_rows_and_lowered_answers_as_hard_eager() -> None:
    rows = list(compare(images_task(), SMALL))
    assert [(row.side, row.stage) for row in rows] == [
        ("dense", "trained"), ("linear", "calibrated"), ("linear", "trained"),
    ]  # fmt: skip
    for row in rows[1:]:
        assert row.sites == row.lowered > 1
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
