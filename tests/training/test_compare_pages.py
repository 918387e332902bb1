"""The comparisons' pages: what they show is made of rows alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.compare import (
    start_cost,
)
from examples.compare.frontier_page import write_table
from examples.compare.frontier_rows import at_bytes, ratios, shown_at


def test_a_start_is_compared_at_the_bytes_of_the_baseline_and_by_the_rounds_ratio() -> None:
    rows = [
        {"preset": "p", "start": name, "tokens": "64", "sparsity": s, "seconds": seconds, "text": "t",
         "bytes_share": share, "ratio_to_dense": ratio, "machine": "x", "torch": "2"}
        for name, s, seconds, share, ratio in (
            ("moefication", "0.5", "10", "0.5", "1.5"), ("moefication", "0.9", "20", "0.1", "9"),
            ("moefication, 150 steps", "0.5", "5", "0.5", "2"), ("moefication, 150 steps", "0.9", "9", "0.1", "20"),
            ("lte, dense inputs", "0.5", "1", "0.48", "1.2"), ("lte, dense inputs", "0.9", "4", "0.12", "6"),
            ("lte, hard inputs", "0.5", "3", "0.52", "1.1"), ("lte, hard inputs", "0.9", "6", "0.1", "5"),
        )
    ]  # fmt: skip
    lines = [line for line in start_cost.table(rows) if line.startswith("| ")]
    assert lines == [
        "| start | tokens | seconds | of moefication's | 50.0% | 10.0% |",
        "| moefication | 64 | 15.0 (10.0 .. 20.0) | 1.00 | x1.500 | x9.000 |",
        "| moefication, 150 steps | 64 | 7.0 (5.0 .. 9.0) | 0.47 | x2.000 | x20 |",
        "| lte, dense inputs | 64 | 2.5 (1.0 .. 4.0) | 0.15 | ~x1.192 | - |",
        "| lte, hard inputs | 64 | 4.5 (3.0 .. 6.0) | 0.30 | ~x1.182 | x5.000 |",
    ]


def made(method: str, target: float, ppl: float, share: float, seed: int = 0) -> dict[str, str]:
    values = {
        "preset": "p",
        "model": "m",
        "method": method,
        "deployable": "True",
        "trained_tokens": 10,
        "group_size": 8,
    }
    values |= {"target_sparsity": f"{target:g}", "seed": seed, "text": "t", "ffn_sparsity": target}
    values |= {"bytes_share": share, "perplexity": ppl, "seconds": 1, "machine": "x", "torch": "2"}
    return {k: str(v) for k, v in values.items()}


def test_ratios_are_to_the_same_seeds_dense_model() -> None:
    rows = [
        made("dense", 0, 10, 1),
        made("dense", 0, 20, 1, 1),
        made("lte", 0.5, 11, 0.5),
        made("lte", 0.5, 30, 0.5, 1),
    ]
    assert ratios(rows)["p", "t", "lte"]["0.5"] == [(1.1, 0.5, 0.5), (1.5, 0.5, 0.5)]


def test_the_view_of_domains_shows_what_rows_have_and_is_left_out_without(tmp_path: Path) -> None:
    def over(row: dict[str, str], ratio: float, domain: str = "training", text: str = "t") -> dict[str, str]:
        found = {"ratio": ratio, "ratio_low": ratio - 0.02, "ratio_high": ratio + 0.04, "measured_tokens": 32768}
        return row | {"domain": domain, "text": text} | {name: str(value) for name, value in found.items()}

    old = [made("dense", 0, 10, 1), made("dense", 0, 10, 1, 1), made("lte", 0.8, 13, 0.2)]
    write_table(old, tmp_path / "t.md")
    assert "Inside and outside" not in (tmp_path / "t.md").read_text()
    inside = [over(made("lte", 0.5, 11, 0.5, s), 1.1 + 0.2 * s) for s in (0, 1)]
    outside = over(made("lte", 0.5, 99, 0.5), 1.7, "outside", "C++") | {"ffn_sparsity": "0.62"}
    rows = [
        *old,
        *inside,
        outside,
        over(made("teal", 0.5, 12, 0.5), 1.15),
        over(made("dense", 0, 50, 1), 1.0, "outside", "C++"),
    ]
    write_table(rows, tmp_path / "t.md")
    table = (tmp_path / "t.md").read_text()
    assert "32,768 tokens a text." in table
    view = table[table.index("| method | sparsity |") :].splitlines()[:5]
    assert view == [
        "| method | sparsity | t | C++ (outside) |",
        "|---|---|---|---|",
        "| lte | 50% | x1.200 (1.080 .. 1.340) [50.0%] | x1.700 (1.680 .. 1.740) [62.0%] |",
        "| teal | 50% | x1.150 (1.130 .. 1.190) [50.0%] | - |",
        "| dense | 0% | - | x1.000 (0.980 .. 1.040) [0.0%] |",
    ]
    assert "C++" not in {text for _, text, _ in ratios(rows)}, "the other views are of the training domain"


def test_equal_bytes_interpolates_between_points_and_never_beyond_them() -> None:
    curve = [(0.2, 4.0), (0.6, 1.0)]
    assert at_bytes(curve, 0.4) == pytest.approx(2.0)
    assert at_bytes(curve, 0.2) == pytest.approx(4.0)
    assert at_bytes(curve, 0.1) is None
    assert at_bytes(curve, 0.7) is None
    assert [shown_at(curve, b) for b in (0.4, 0.7)] == ["~x2.000", "-"]
    assert shown_at(curve, 0.2) == "x4.000"  # a point of its own
    assert shown_at([*curve, (0.5, 1.1)], 0.55) == "x1.049"


def test_the_table_shows_spread_over_seeds_and_what_was_not_measured(tmp_path: Path) -> None:
    rows = [made("dense", 0, 10, 1, s) for s in (0, 1)]
    rows += [made("lte", 0.5, 11 + s, 0.5, s) for s in (0, 1)] + [made("cats", 0.8, 20, 0.4)]
    write_table(rows, tmp_path / "t.md")
    table = (tmp_path / "t.md").read_text()
    assert "x1.150 (1.100 .. 1.200) [50.0%]" in table
    assert "; 1 to 2 seeds (ranges in the first table);" in table
    assert "| cats | not measured | x2.000 [80.0%] |" in table


def test_the_table_names_methods_of_another_group_size(tmp_path: Path) -> None:
    rows = [made("dense", 0, 10, 1), made("lte", 0.5, 11, 0.5)]
    rows.append({**made("lte-proxy", 0.5, 10.2, 0.6), "group_size": "1"})
    write_table(rows, tmp_path / "t.md")
    usual = rows[0]["group_size"]
    assert f"tokens. Groups of {usual}, of 1 in lte-proxy; " in (tmp_path / "t.md").read_text()


def test_the_table_says_which_cuts_were_placed_in_another_way(tmp_path: Path) -> None:
    rows = [made("dense", 0, 10, 1), made("lte", 0.5, 11, 0.5), made("lte+cuts", 0.5, 12, 0.5)]
    rows.append({**made("lte+cuts", 0.8, 13, 0.2), "cut_sample": "rows"})
    write_table(rows, tmp_path / "t.md")
    table = (tmp_path / "t.md").read_text()
    assert "| lte+cuts | x1.200 [50.0%]† | x1.300 [80.0%] |" in table
    assert "Measured again by random rows: lte+cuts at 80% (p)." in table
    assert table.count("†") == 2
    write_table([*rows[:2], rows[3]], tmp_path / "t.md")
    assert "†" not in (tmp_path / "t.md").read_text()
