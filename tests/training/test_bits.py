"""examples/compare: a network off its grid, and bits against quality."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import ltepass
from examples.compare import bits
from examples.compare.off_grid import off_grid
from ltepass.demo.tiny import untrained
from ltepass.kernels.weight_formats import dequantise_int4, quantise_int4
from tests.models import zoo


def on_the_grid(weight: torch.Tensor) -> torch.Tensor:
    return dequantise_int4(*quantise_int4(weight, with_minimum=True))


def llama(*, tied: bool) -> LlamaForCausalLM:
    """Weights from a Q4_1 file; norms with gains."""
    model: LlamaForCausalLM = zoo.llama(hidden_size=96, intermediate_size=160, tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(on_the_grid(p) if p.dim() == 2 else 1 + 0.3 * torch.randn(p.shape, generator=generator))
            assert p.dim() == 2 or "norm" in name
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_off_its_grid_a_network_computes_the_same(tied: bool) -> None:
    model = llama(tied=tied)
    with torch.no_grad():
        moved = off_grid(model)
        torch.testing.assert_close(zoo.logits(moved), zoo.logits(model), rtol=1e-4, atol=1e-5)
        assert model.config.tie_word_embeddings == tied  # a copy was changed
        for before, after in zip(model.modules(), moved.modules(), strict=True):
            if not isinstance(before, nn.Linear):
                continue
            assert torch.equal(on_the_grid(before.weight), before.weight)
            left = (on_the_grid(after.weight) - after.weight).norm() / after.weight.norm()
            assert left > 0.02, "rounding to the file's format costs something now"


def test_rounding_takes_the_nearest_level_and_more_bits_lose_less() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    lost = [float((bits.rounded(weight, n) - weight).norm()) for n in (3, 4, 5, 6)]
    assert lost == sorted(lost, reverse=True)
    block = bits.rounded(weight, 4)[0, :32]
    assert len(block.unique()) <= 15
    scale = (block[block != 0].abs().min()).item()
    inside = weight[0, :32].abs() < 7 * scale
    assert ((block - weight[0, :32]).abs()[inside] <= scale / 2 + 1e-6).all()
    exact = torch.arange(-15.0, 17.0)[None].clamp(-7, 7)
    assert torch.equal(bits.rounded(exact, 4), exact)


def test_the_smoke_preset_measures_every_method_once_and_makes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bits.csv"
    arguments = ["bits", "--preset", "smoke", "--work", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(bits, "TIERS", ((0.0, 1.0), (0.1, 0.6)))
    monkeypatch.setattr("examples.compare.models.load", lambda *_: untrained(d_ff=384).eval())
    bits.main()
    first = out.read_text()
    page = out.with_suffix(".md").read_text()
    assert page.count("tiers of int8 x, p 0.1, q 0.6") == 1
    assert page.count("Q4_1") == 1
    bits.main()
    assert out.read_text() == first  # nothing is measured twice


def test_bits_of_tiers_are_those_that_the_report_counts() -> None:
    config = ltepass.LTEConfig(router="proxy", inactive="low_bit", target_sparsity=0.8, low_bit_sparsity=0.4)
    gated = ltepass.transform(zoo.llama(), config=config, calibration=[zoo.ids(8, 32)])
    ltepass.set_sparsity(gated, 0.8)
    counted = ltepass.report(gated).bits
    assert counted is not None
    read, held = bits.tier_bits(gated, 0.2, 0.6)
    assert read == pytest.approx(counted.read, rel=0.02)
    assert held == pytest.approx(counted.held, rel=1e-6)
