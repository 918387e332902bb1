"""The census: each architecture does what the committed table says, and what it lacks has a sentence that says why.

The table is written by `ltepass coverage --out examples/results`. Rows of a quick subset are made again here, in their
own processes; `pytest -m slow tests/models/test_coverage.py` makes all of them again.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import transformers

import ltepass
from examples.coverage import census, known_reasons, lacking, page
from examples.coverage.architectures import entries
from examples.coverage.examine import TOLERANCE, Example, Row, examine
from ltepass.errors import ConfigError
from tests.models import zoo

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
QUICK = (
    *("llama", "gpt2", "opt", "falcon", "phi3", "gpt_oss", "qwen2_moe", "bitnet", "jetmoe", "gemma3n"),
    *("T5", "Whisper", "BERT", "SegFormer", "PatchTSMixer", "torch.nn.TransformerDecoderLayer", "gpt-fast style"),
)
TABLE = page.read_table(RESULTS) if (RESULTS / "coverage.csv").exists() else []
PAGE = (RESULTS / "coverage.md").read_text() if TABLE else ""
OF_THIS_VERSION = f"transformers {transformers.__version__}" in PAGE
needs_table = pytest.mark.skipif(not TABLE, reason="no table: `ltepass coverage --out examples/results` writes it")
MEASURED = ("dense_error", "lowered_error", "seconds", "nodes")  # differ from machine to machine
REST = [name for name in entries() if name not in QUICK]


def check_row(row: Row) -> None:
    """Whatever was found computes the same, and whatever was not stands in the committed list."""
    assert lacking.unexplained(row) == [], row
    if row.status != "ok":
        return
    assert row.gates_act or row.name in known_reasons.INVISIBLE, row
    assert row.dense_error is not None
    assert row.dense_error <= TOLERANCE, row
    if row.lowered:
        assert row.masks_equal, row
        assert row.lowered_error is not None
        assert row.lowered_error <= TOLERANCE, row
    assert row.lowered == row.sites or row.kept, row


def check_not_stale(row: Row) -> None:
    """Compared only where the table was made with this version of transformers."""
    if not OF_THIS_VERSION:
        return
    (committed,) = [r for r in TABLE if r.name == row.name]
    now, then = ({k: v for k, v in asdict(r).items() if k not in MEASURED} for r in (row, committed))
    assert now == then, "the table is stale: run `ltepass coverage --out examples/results`"


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_a_row_is_as_the_table_says(name: str) -> None:
    (row,) = census.take_census([name])
    check_row(row)
    check_not_stale(row)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_each_committed_row_is_right_or_explained(row: Row) -> None:
    check_row(row)


@needs_table
def test_the_table_has_every_architecture_and_the_aim_is_reached() -> None:
    rows = TABLE
    if OF_THIS_VERSION:
        assert [r.name for r in rows] == list(entries())
    groups = lacking.summary(rows)
    assert len(groups["instantiate and run"]) >= 164
    assert len(groups["get every one"]) >= lacking.WANTED_SHARE * len(groups["have a dense FFN"])


@needs_table
@pytest.mark.skipif(
    not OF_THIS_VERSION,
    reason=f"the page tells causal LMs by another transformers than {transformers.__version__}",
)
def test_the_page_is_what_the_rows_give() -> None:
    assert PAGE.splitlines()[3:] == page.page(TABLE).splitlines()[3:]  # above it: versions


@needs_table
def test_no_sentence_is_left_over() -> None:
    rows = {r.name: r for r in TABLE}
    assert {n for n in known_reasons.NOT_BUILT if rows[n].status not in ("build", "stopped")} == set()
    for name, parts in known_reasons.UNFOUND.items():
        assert [p for p in parts if p not in rows[name].unfound] == [], name


def test_what_is_not_explained_is_named() -> None:
    assert lacking.unexplained(Row(name="llama", status="dense")) == ["dense"]
    assert lacking.unexplained(Row(name="llama", unfound="a.down_proj b.down_proj")) == ["a.down_proj", "b.down_proj"]
    row = Row(name="bitnet", unfound="model.layers.0.mlp.down_proj other.fc2")
    assert lacking.unexplained(row) == ["other.fc2"]
    assert lacking.dense_ffns_missed(row) == ["model.layers.0.mlp.down_proj", "other.fc2"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such_model: no causal LM"):
        list(census.take_census(["llama", "no_such_model"]))


def test_a_check_that_takes_too_long_or_too_much_is_stopped_and_the_rest_goes_on() -> None:
    (late,) = census.take_census(["gpt2"], timeout=0.01)
    assert (late.status, late.sites) == ("stopped", 0)
    (big,) = census.take_census(["gpt2"], memory=1 << 20)
    assert big.status in ("build", "stopped")


def test_memory_that_is_not_there_is_no_fault_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    def example() -> Example:
        return Example(model=zoo.llama(), inputs={"input_ids": zoo.ids()})

    monkeypatch.setattr("torch.export.export", full)
    with pytest.raises(MemoryError):
        ltepass.transform(example().model)
    row = examine("llama", example)
    assert (row.status, row.detail) == ("stopped", "MemoryError: it needs more than a check may take")


def test_an_error_is_a_row() -> None:
    def broken() -> Example:
        raise RuntimeError("no such config")

    row = examine("broken", broken)
    assert row.status == "build"
    assert row.detail.startswith("RuntimeError: no such config")
