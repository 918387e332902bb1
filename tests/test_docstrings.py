"""Every public callable says what it takes, gives and raises, and its example runs."""

from __future__ import annotations

import copy
import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ltepass
from tests.models.zoo import build
from tests.stand_in_torchao import put_in_place

CALLABLES = [name for name in ltepass.__all__ if callable(getattr(ltepass, name))]
EXPORTS = ("export", "exported_loop")  # compile a package, for a minute
PARTS = ("Arguments", "Returns", "Raises", "Example")


def parts_of(doc: str) -> list[str]:
    """Headings of a docstring, at its margin."""
    return re.findall(r"^(\w+)(?: \(.*\))?:", doc, re.MULTILINE)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, torch.Tensor]:
    """A dense model, a transformed and calibrated one, and token ids."""
    dense = build("llama")
    ids = torch.randint(0, 61, (4, 32), generator=torch.Generator().manual_seed(1))
    config = ltepass.LTEConfig(group_size=12)
    return dense, ltepass.transform(copy.deepcopy(dense), config=config, calibration=[ids]), ids


@pytest.mark.parametrize("name", CALLABLES)
def test_a_public_callable_says_in_four_parts_what_it_does(name: str) -> None:
    public = getattr(ltepass, name)
    doc = inspect.getdoc(public) or ""
    first, blank, *_ = doc.splitlines()
    wanted = [part for part in PARTS if part != "Returns" or not inspect.isclass(public)]  # a class gives itself
    assert [part for part in parts_of(doc) if part in PARTS] == wanted
    assert first.endswith((".", "))")), "one line first"
    assert not blank


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments_are_those_there_are(name: str) -> None:
    public = getattr(ltepass, name)
    doc = inspect.getdoc(public) or ""
    said = doc[doc.index("Arguments") : doc.index("Raises")]
    for argument in inspect.signature(public).parameters:
        assert argument in ("args", "kwargs") or re.search(rf"\b{argument}\b", said), argument


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in EXPORTS else name for name in CALLABLES]
)
def test_its_example_runs(
    name: str, models: tuple[Any, Any, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dense: a model; model: one that is transformed and calibrated; ids: [4, 32]; batches: a list of ids."""
    put_in_place(monkeypatch)
    dense, model, ids = models
    given = {"ltepass": ltepass, "torch": torch, "dense": copy.deepcopy(dense), "model": copy.deepcopy(model)}
    given |= {"ids": ids, "batches": [ids], "folder": tmp_path / "folder"}
    doc = inspect.getdoc(getattr(ltepass, name)) or ""
    example = doctest.DocTestParser().get_doctest(doc, given, name, None, None)
    assert example.examples
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.failed == 0, "".join(said)
