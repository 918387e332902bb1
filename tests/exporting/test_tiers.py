"""A model in tiers of bits that is exported decodes what the same graph, and the model itself, say in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ltepass
from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.routed.routed import routers_of
from tests.models.test_tiers import tiered

PROMPT, NEW = [5, 17, 9, 33, 21], 12


@pytest.mark.slow
@pytest.mark.parametrize("low_bit_sparsity", [0.0, 0.4])
def test_tokens_are_those_of_plain_pytorch(low_bit_sparsity: float, tmp_path: Path) -> None:
    model: Any = tiered(low_bit_sparsity=low_bit_sparsity, target_sparsity=0.8)
    ltepass.set_mode(model, "hard")
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert len({*ids[len(PROMPT) :]}) > 1, "no constant answer"
    decoder = ExportedDecoder(ltepass.export(model, tmp_path / "exported", length=32))
    given, got = PROMPT, list[int]()
    while len(got) < NEW:
        given = [int(decoder(given).argmax())]
        got += given
    assert got == ids[len(PROMPT) :]
    low = sum(t.nbytes for router in routers_of(model) for t in router.low_planes())
    assert decoder.about.gated_bytes == low
    names = set(decoder._weights)
    assert any(name.endswith("down_codes") for name in names)
    assert not any(name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")) for name in names)
