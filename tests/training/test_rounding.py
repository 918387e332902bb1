"""examples/compare/rounding: how far logits move."""

from __future__ import annotations

import pytest
import torch

import ltepass
from examples.compare import rounding
from examples.compare.rounding import CHANGES, Moved, moved, page
from tests.models import zoo


def test_logits_that_move() -> None:
    before = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    nowhere = Moved.of(before, before + 3.0, torch.tensor([0, 0, 1]))
    assert nowhere.divergence == pytest.approx(0.0, abs=1e-12)
    assert nowhere.other_best == 0.0
    assert nowhere.loss == pytest.approx(0.0, abs=1e-12)
    # The second token, whose next is the second one of the vocabulary, prefers the first now.
    after = before.clone()
    after[1] = before[1].flip(0)
    there = Moved.of(before, after, torch.tensor([0, 0, 1]))
    assert there.other_best == pytest.approx(1 / 3)
    assert there.loss == pytest.approx(1.0)
    assert there.divergence > 0.1


def test_each_change_of_each_block_is_measured() -> None:
    """A dense model moves by its rounding, and a routed one is measured for both changes."""
    blocks = torch.randint(zoo.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    dense = zoo.llama().eval()
    for change, found in moved(dense, blocks).items():
        assert max(m.divergence for m in found) < 1e-9, change
    config = ltepass.LTEConfig(router="proxy", target_sparsity=0.5)
    routed = moved(ltepass.transform(dense, config=config, calibration=[blocks]), blocks)
    assert list(routed) == list(CHANGES)
    assert [len(some) for some in routed.values()] == [2, 2]


def test_the_page_has_a_row_for_each() -> None:
    row = dict.fromkeys(rounding.FIELDS, "0.5") | {"model": "m", "change": "lowered", "tokens": "64", "method": "proxy"}
    assert "| proxy | 50% | lowered | 0.5 | 50.00% | x0.5 |" in page([row])
