"""examples/compare/drafts: what is accepted is counted, and the page is made of rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.compare import drafts, models
from examples.compare.drafts import FIELDS, LOOKUP, PROPOSED, Case, Measured, page, rows_of
from ltepass.demo.tiny import untrained
from tests.training.learning_cases import dense_model, tokens

CHECKS = 2


def test_a_draft_that_is_the_model_is_accepted_whole() -> None:
    ids = tokens(4)
    cases = (Case("linear", 0.5, 0.5), Case("linear", 0.5, 0.95), Case("linear", 0.5, None))
    same, other, lookup = rows_of("m", dense_model(d_ff=128), ids, ids[:2], CHECKS * (PROPOSED + 1), cases)
    assert (same.accepted, same.a_check) == (1.0, PROPOSED + 1)
    assert 0.0 <= other.accepted < 1.0
    assert 1.0 <= other.a_check < PROPOSED + 1
    assert [row.help for row in (same, other, lookup)] == ["draft at 50%", "draft at 95%", LOOKUP]
    assert (same.same, other.same, lookup.same) == (1.0, 1.0, 1.0)
    assert 0.0 < same.memory < 0.01
    assert lookup.memory == 0.0
    assert same.used == pytest.approx(0.5, abs=0.1)
    assert same.used < same.together <= 1.0


def test_the_command_keeps_the_rows_of_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_train_tiny", lambda blocks: untrained(d_ff=384).eval())
    found = Measured(**{**dict.fromkeys(FIELDS, 0), "model": "tiny"})  # type: ignore[arg-type]
    monkeypatch.setattr(drafts, "rows_of", lambda *args: [found])
    out = tmp_path / "drafts.csv"
    out.write_text(",".join(FIELDS) + "\n" + "other" + ",0" * (len(FIELDS) - 1) + "\n")
    drafts.main(["--work", str(tmp_path), "--out", str(out), "--prompts", "1", "--tokens", "6"])
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == ["model", "other", "tiny"]
    assert "## tiny" in out.with_suffix(".md").read_text()


def test_the_page_has_a_row_for_each() -> None:
    row = dict.fromkeys(FIELDS, "0.5") | {"model": "m", "router": "tiers", "help": "draft at 99%", "memory": "0.0001"}
    assert "| tiers | 50% | draft at 99% | 0.50 | 0.50 | x0.50 | 50% | 0.01% | 50% | 50% |" in page([row])
