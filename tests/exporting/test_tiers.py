"""A model in tiers of bits that is exported decodes what the same graph, and the model itself, say in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ltepass
from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.kernels.packed_planes import pack
from ltepass.routed.routed import routers_of
from ltepass.routed.tiered_router import TieredRouter
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
    planes = [pack(router.planes()) for router in routers_of(model) if isinstance(router, TieredRouter)]
    assert decoder.about.gated_bytes == sum(packed.low.nbytes for packed in planes)
    assert decoder.about.token_bytes > sum(packed.high.nbytes for packed in planes)
    names = set(decoder._weights)
    assert not any(name.endswith(("codes", "multipliers", "scales")) for name in names)
    assert not any(name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")) for name in names)
