"""examples/compare/shortlists: what a shortlist costs is measured against all rows in 8 bits, and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.compare import bits, shortlists
from examples.compare.frontier_rows import Rows
from examples.compare.shortlists import heads, measured
from tests.models import zoo


def test_all_rows_of_a_shortlist_are_the_head_in_8_bits_and_4_bits_alone_are_worse() -> None:
    torch.manual_seed(0)
    model = zoo.llama(hidden_size=96, vocab_size=1500).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    blocks = torch.randint(1500, (8, 20), generator=torch.Generator().manual_seed(0))
    found = measured(model, blocks)
    assert list(found) == ["int8", "shortlist 16", "shortlist 64", "shortlist 256", "shortlist 1024", "int4"]
    assert found["int8"][0] == 0
    assert found["int8"][1].value == 1.0
    assert found["int4"][0] > 0.1
    assert found["shortlist 1024"][0] == 0
    assert abs(found["shortlist 1024"][1].value - 1) < abs(found["shortlist 16"][1].value - 1)
    assert heads(model.get_output_embeddings().weight.detach())["int4"][1] == pytest.approx((48 + 6) / (96 + 4))


def test_the_command_writes_rows_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "shortlists.csv"
    shortlists.main(["--preset", "smoke", "--work", str(tmp_path), "--out", str(out)])
    page = out.with_suffix(".md").read_text()
    tokens = bits.PRESETS["smoke"].blocks * bits.PRESETS["smoke"].length
    assert f"{tokens:,} tokens a text" in page
    assert "| int8 | 100% | 0.00 %, x1.000 (1.000 .. 1.000)" in page
    assert page == shortlists.page(Rows(out).read())
