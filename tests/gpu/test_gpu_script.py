"""The one GPU script, on a machine without a GPU: it runs, and says of every row that it was not measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.gpu import results, run_all
from examples.results.demo_table import with_table
from tests.gpu.old_versions import needs_interpreter

pytest.importorskip("triton")
FOLDER = Path(run_all.__file__).parent


@pytest.mark.slow
@needs_interpreter
def test_dry_run(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(FOLDER / "run_all.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "failed stages: none" in done.stdout
    rows = results.read(tmp_path / "speed.csv")
    assert rows == results.expected()
    assert done.stdout.count(results.NOT_MEASURED) >= 3 * len(rows)


def test_the_suite_has_every_test() -> None:
    tests = FOLDER.parents[1] / "tests"
    there = {p.parent if p.parent != tests else p for p in tests.rglob("test_*.py")}
    assert {str(p.relative_to(tests.parent)) for p in there} == {path for part in run_all.SUITE for path in part}


def test_the_committed_table_has_every_row_once() -> None:
    rows = results.read(FOLDER / "speed.csv")
    assert [r.key for r in rows] == [r.key for r in results.expected()]
    assert all((r.microseconds == results.NOT_MEASURED) == (r.device == results.NOT_MEASURED) for r in rows)


def test_the_page_shows_the_committed_table() -> None:
    page = results.PAGE.read_text()
    table = results.markdown(results.read(FOLDER / "speed.csv"))
    assert with_table(page, table, results.BEGIN, results.END) == page, "run python -m examples.gpu.results"


def test_a_row_says_whether_it_met_its_target() -> None:
    share = next(r for r in results.expected() if r.target == "share >= 0.8")
    assert share.filled(10.0, 0.81, None, 0.01).met == "yes"
    assert share.filled(10.0, 0.79, 9.9, 0.01).met == "no"
    speedup = next(r for r in results.expected() if r.target == "speedup >= 1.4")
    assert speedup.filled(10.0, 0.1, 1.4, 0.01).met == "yes"
    assert share.met == results.NOT_MEASURED


def test_only_known_rows_are_merged_and_a_plot_needs_a_measurement(tmp_path: Path) -> None:
    rows = results.expected()
    measured = rows[0].filled(123.4, 0.9, 1.0, 0.001, device="a GPU", software="torch")
    assert results.merged([measured]) == [measured, *rows[1:]]
    with pytest.raises(AssertionError, match="measured, but not in the table"):
        results.merged([rows[0].__class__(**{**rows[0].__dict__, "tokens": 3})])
    pytest.importorskip("matplotlib")
    assert not results.plot(tmp_path / "none.png", rows)
    assert results.plot(tmp_path / "one.png", [measured, *rows[1:]])
    assert (tmp_path / "one.png").stat().st_size > 1000
