"""`transform(match="mlp")`: blocks that are not as wide where they end as where they begin, through every call."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import ltepass
from ltepass.config import RouterKind
from ltepass.errors import CheckpointError, ConfigError, NoFFNFoundError
from ltepass.saving.plain_modules import SITES
from tests.passes.ffn_forms import Gated, Plain
from tests.typed import lte_state

D, PROJECTED, CLASSES, H = 12, 20, 7, 48
TOKENS = torch.randn(6, 9, D, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A block of the given form from one width to another."""

    def __init__(self, form: type[Plain | Gated], width: int, out: int) -> None:
        super().__init__()
        self.ffn = form(F.gelu, bias=True, d=width, h=H)
        last = "down" if form is Plain else "w2"
        setattr(self.ffn, last, nn.Linear(H, out))

    def forward(self, x: Tensor) -> Any:
        return self.ffn(x)


class Tower(nn.Module):
    """A projector to wider tokens, and a head to narrower ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.between = nn.LayerNorm(D), nn.LayerNorm(PROJECTED)
        self.projector, self.head = Block(Gated, D, PROJECTED), Block(Plain, PROJECTED, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self.projector(self.norm(x))))


def routed(router: RouterKind = "linear", sparsity: float = 0.5) -> nn.Module:
    """Calibrated, in hard mode."""
    config = ltepass.LTEConfig(router=router, group_size=4 if router == "linear" else 1, target_sparsity=sparsity)
    model = ltepass.transform(Tower().eval(), TOKENS, config, [{"x": TOKENS}], match="mlp")
    ltepass.set_mode(model, "hard")
    return model


@torch.no_grad()
def test_dense_mode_is_the_model_and_remove_gives_it_back() -> None:
    plain = Tower().eval()
    model = routed()
    assert [(s.d_model, s.d_out, s.kind) for s in lte_state(model).sites] == [
        (D, PROJECTED, "aligned"),
        (PROJECTED, CLASSES, "aligned"),
    ]
    ltepass.set_mode(model, "dense")
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    ltepass.remove(model, undo_grouping=True)
    assert torch.equal(model(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("router", ["linear", "proxy"])
@torch.no_grad()
def test_lowered_equals_hard_eager(router: RouterKind) -> None:
    model = routed(router)
    expected = model(TOKENS)
    assert (expected - Tower().eval()(TOKENS)).norm() > 0.01 * expected.norm(), "something is left out"
    compiled = torch.compile(copy.deepcopy(model), backend="lte")
    torch.testing.assert_close(compiled(TOKENS), expected)
    ltepass.lower(model)
    assert not any("masked-dense" in note for note in ltepass.report(model).notes)
    torch.testing.assert_close(model(TOKENS), expected)
    ltepass.lower(ltepass.unlower(model), linears="int8")
    assert (model(TOKENS) - expected).norm() < 0.05 * expected.norm()


def test_they_train_and_are_refitted() -> None:
    model = routed()
    errors = ltepass.warm_start(model, TOKENS)
    assert all(0 < error < 1 for error in errors.values())
    ltepass.begin_stage(model, "soft")
    task, auxiliary = model(TOKENS).square().mean(), ltepass.take_auxiliary(model, None)
    (task + auxiliary.efficiency + auxiliary.separability).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@torch.no_grad()
def test_the_report_counts_the_weights_that_are_there() -> None:
    model = routed(sparsity=0.0)
    weights = H * (2 * D + PROJECTED) + H * (PROJECTED + CLASSES)
    biases_and_routers = 4 * H * 3 + 4 * (H // 4) * (D + PROJECTED + 2)
    report = ltepass.report(model)
    assert report.bits is not None
    assert report.bits.held == pytest.approx(8 * (4 * weights + biases_and_routers) / weights, rel=0.02)
    assert f"{D} to {PROJECTED}" in str(report.to_html())


@torch.no_grad()
def test_they_save_load_and_prune(tmp_path: Path) -> None:
    model = routed()
    expected = model(TOKENS)
    ltepass.save(model, tmp_path)
    loaded = ltepass.load(Tower().eval(), tmp_path)
    assert torch.equal(loaded(TOKENS), expected)
    ltepass.prune(model, [{"x": TOKENS}], sparsity=0.25)
    assert [s.d_ff for s in lte_state(model).sites] == [H - 12, H - 12]
    ltepass.save(model, tmp_path / "pruned")
    assert torch.equal(ltepass.load(Tower().eval(), tmp_path / "pruned")(TOKENS), model(TOKENS))


@pytest.mark.parametrize("width", [None, PROJECTED + 1, 0, "20"])
def test_a_wrong_width_in_a_file_is_refused(tmp_path: Path, width: object) -> None:
    ltepass.save(routed(), tmp_path)
    state = json.loads((tmp_path / SITES).read_text())
    (site, _) = (s for s in _sites(state))
    assert site["out_width"] == PROJECTED
    site["out_width"] = width
    if width is None:
        del site["out_width"]
    (tmp_path / SITES).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"features there|out_width"):
        ltepass.load(Tower().eval(), tmp_path)


def _sites(state: Any) -> list[dict[str, Any]]:
    return state["sites"] if "sites" in state else next(filter(None, map(_sites, state.values())))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(NoFFNFoundError, match=r'maps width 20 to 7.*\(match="mlp" takes it\)'):
        ltepass.transform(Tower(), TOKENS)
    with pytest.raises(ConfigError, match="match is 'head'; expected one of ffn, mlp"):
        ltepass.transform(Tower(), TOKENS, match="head")  # type: ignore[arg-type]
    tiers = ltepass.LTEConfig(router="proxy", inactive="low_bit")
    with pytest.raises(ConfigError, match='match is "mlp" and inactive "low_bit"'):
        ltepass.transform(Tower(), TOKENS, tiers, match="mlp")
