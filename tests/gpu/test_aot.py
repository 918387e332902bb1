"""Every kernel compiles for GPUs that this machine lacks, without spills and as the committed table says."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
aot = pytest.importorskip("examples.gpu.aot", exc_type=ImportError)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

LIMITS = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "gfx942": 64 * 1024}  # bytes of shared memory a program may use


def test_the_table_lists_what_the_host_code_launches() -> None:
    wanted = {(*launch.row_key, target) for target in aot.TARGETS for launch in aot.launched(target)}
    listed = {tuple(r[c] for c in aot.COLUMNS[:6]) for r in aot.stored()}
    assert wanted == listed, "run python -m examples.gpu.aot"


def test_nothing_in_the_table_spills_or_is_too_large() -> None:
    for row in aot.stored():
        assert row["spills"] == "0", row
        assert int(row["shared"]) <= LIMITS[row["target"]], row
        assert int(row["registers"]) <= aot.MOST_REGISTERS, row


def test_a_sample_compiles_as_the_table_says() -> None:
    rows = list(aot.rows(every=211))
    assert {r["target"] for r in rows} == set(aot.TARGETS)
    assert not aot.differences(rows, aot.stored())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_of_them_compile_as_the_table_says() -> None:
    assert not aot.differences(list(aot.rows()), aot.stored())


def test_a_difference_is_reported() -> None:
    row = aot.stored()[0]
    assert aot.differences([row], [row]) == []
    assert "the table says" in aot.differences([{**row, "registers": "1"}], [row])[0]
    assert "spills 4" in aot.differences([{**row, "spills": "4"}], [row])[0]
    assert "not in aot_table.csv" in aot.differences([row], [])[0]
    other = {**row, "registers": "80", "triton": "3.6.0"}
    assert aot.differences([other], [row]) == [], "another compiler, other figures"
    assert aot.differences([{**other, "spills": "6"}], [row]) == []
    assert "spills 6" in aot.differences([{**other, "spills": "6", "registers": "255"}], [row])[0]
