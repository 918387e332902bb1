"""LTEConfig(router="proxy"): one model in eager, lowered, compiled and saved; what is calibrated, trained, refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ltepass
from ltepass.errors import CheckpointError, ConfigError, LoweringError, MetaWeightsError, ShardedError
from ltepass.kernels import proxy_codes
from ltepass.measure.token_bytes import router_share, weights_read
from ltepass.routed.proxy_router import CONSTANTS
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from tests.models import zoo
from tests.models.proxied import proxied, routers
from tests.models.zoo import Graphs

NAMES = ("llama", "opt", "phi3", "gpt2", "own")  # gated, inline with biases, fused, conv1d, no Hugging Face model


@pytest.mark.parametrize("name", NAMES)
def test_lowered_is_hard_eager(name: str) -> None:
    model = proxied(name)
    dense = zoo.logits(model)
    assert torch.equal(dense, zoo.logits(zoo.build(name)))
    ltepass.set_mode(model, "hard")
    hard = zoo.logits(model)
    assert not torch.equal(hard, dense)
    ltepass.lower(model)
    assert ltepass.report(model).notes == []
    for x in (None, zoo.ids(1, 1)):
        torch.testing.assert_close(
            zoo.logits(model, x), zoo.logits(ltepass.unlower(copy.deepcopy(model)), x), rtol=1e-4, atol=1e-6
        )
    ltepass.unlower(model)
    assert torch.equal(zoo.logits(model), hard)
    ltepass.remove(model, undo_grouping=True)
    assert torch.equal(zoo.logits(model), dense)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_backend_lowers_it(name: str) -> None:
    model = proxied(name)
    ltepass.set_mode(model, "hard")
    hard = zoo.logits(model)
    torch._dynamo.reset()  # what other tests compiled of the same classes may serve this model too
    with Graphs() as graphs:
        torch.testing.assert_close(zoo.logits(torch.compile(model, backend="lte")), hard, rtol=1e-4, atol=1e-6)
    assert [sum(counts) for counts in zip(*graphs.seen, strict=True)] == [2, 2]


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("settings", [{}, {"proxy_scales": "rows"}, {"group_size": 4}, {"budget": "model"}])
def test_saved_and_loaded_is_the_same_model(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model: Any = proxied(name, **settings)
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(zoo.logits(again), expected)
    for ours, theirs in zip(routers(again), routers(model), strict=True):
        for name_ in (*CONSTANTS, "weight", "bias", "threshold", "quantiles"):
            a, b = getattr(ours, name_), getattr(theirs, name_)
            assert a is b is None or torch.equal(a, b), name_
    assert ltepass.report(again).config["router"] == "proxy"
    assert (routers(again)[0].multipliers is None) == (settings.get("proxy_scales") == "rows")
    assert (routers(again)[0].biases is not None) == (name == "opt")
    ltepass.lower(again)
    torch.testing.assert_close(zoo.logits(again), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        ("codes", lambda t: t[..., :8].clone(), "U8"),
        ("codes", lambda t: t.to(torch.int8), "I8"),
        ("scales", lambda t: t.double(), "F64"),
        ("sizes", lambda t: None, "missing"),
        ("weight", lambda t: t[:, None].clone(), "F32"),
        ("multipliers", lambda t: torch.full_like(t, 255), "multiplier"),
    ],
)
def test_a_changed_tensor_is_refused(tensor: str, change: Any, says: str, tmp_path: Path) -> None:
    model: Any = proxied()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.router.{tensor}"
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_cuts_and_budget_work_beside_it() -> None:
    model = proxied(hidden_sparsity=0.2, input_sparsity=0.2)
    ltepass.set_mode(model, "hard")
    hard = zoo.logits(model)
    assert all(router.cut > 0 and router.input_cut > 0 for router in routers(model))  # type: ignore[operator]
    torch.testing.assert_close(zoo.logits(ltepass.lower(model)), hard, rtol=1e-4, atol=1e-6)


def test_bytes_count_the_codes() -> None:
    model: Any = proxied()
    ltepass.set_mode(model, "hard")
    sites = ltepass.report(model).sites
    router = routers(model)[0]
    own = sum(t.nbytes for t in router.operands() if t is not None)
    assert own >= 2 * 60 * 24 / 2
    assert router_share(model, sites) == pytest.approx(own / (3 * 60 * 24 * 4))
    linear: Any = zoo.transformed("llama")
    read = [weights_read(m, active=0.5) for m in (model, linear)]
    theirs = sum(p.nbytes for r in Routed.of(linear, "the test").routers for p in r.parameters())
    assert read[0] - read[1] == pytest.approx(2 * own - theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = proxied()
    ltepass.set_mode(model, "hard")
    model.to(dtype)
    assert all(r.scales.dtype == torch.float32 and r.codes.dtype == torch.uint8 for r in routers(model))
    hard = zoo.logits(model)
    assert hard.isfinite().all()
    torch.testing.assert_close(zoo.logits(ltepass.lower(model)).float(), hard.float(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("inactive", ["zero", "low_bit"])
def test_a_call_that_fails_leaves_codes_as_they_were(inactive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = proxied(inactive=inactive)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr("ltepass.calibration.calibrate_model.place_cuts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ltepass.calibrate(model, [zoo.ids(4, 32)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_a_proxy_cannot_be_is_refused() -> None:
    for settings, says in (
        ({"router": "both"}, "linear, proxy"),
        ({"proxy_scales": "tiles"}, "blocks, rows"),
        ({"router": "proxy", "router_bias": False}, "never negative"),
    ):
        with pytest.raises(ConfigError, match=says):
            ltepass.LTEConfig(**settings)
    with torch.device("meta"):
        meta = zoo.llama()
    with pytest.raises(MetaWeightsError, match="proxy"):
        ltepass.transform(meta, config=ltepass.LTEConfig(router="proxy"))
    assert not any(isinstance(m, Router) for m in meta.modules())


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 60), nn.Linear(60, 24)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


def test_an_activation_that_no_proxy_computes() -> None:
    model = Tanh().eval()
    config = ltepass.LTEConfig(router="proxy")
    with pytest.raises(ConfigError, match='router="linear", or skip='):
        ltepass.transform(model, torch.randn(2, 24), config)
    assert not any(isinstance(m, Router) for m in model.modules())


def test_where_an_adapter_holds_the_weights_codes_stay() -> None:
    peft = pytest.importorskip("peft")
    model: Any = proxied()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj", "gate_proj"]))
    codes = [router.codes.clone() for router in routers(model)]
    ltepass.settle(adapted, [zoo.ids(4, 16)], 0.6)
    assert all(torch.equal(a, router.codes) for a, router in zip(codes, routers(model), strict=True))
    with pytest.raises(ShardedError, match="before wrapping"):
        ltepass.calibrate(adapted, [zoo.ids(4, 16)])


def test_a_soft_gate_is_not_lowered() -> None:
    model = proxied()
    ltepass.set_mode(model, "soft")
    with pytest.raises(LoweringError):
        ltepass.lower(model)
    assert not torch.equal(zoo.logits(model), zoo.logits(zoo.build("llama")))


def test_old_settings_say_nothing_of_it() -> None:
    assert (ltepass.LTEConfig().router, ltepass.LTEConfig().proxy_scales) == ("linear", "blocks")
    assert proxy_codes.blocks_of(24) == 1
