"""LTEConfig(inactive="low_bit"): what a model computes from its planes, against lines of the definition."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ltepass
from ltepass.calibration import gptq
from ltepass.calibration.gptq import codes_along_inputs
from ltepass.errors import CheckpointError, ConfigError, ShardedError
from ltepass.kernels.planes import dequantise
from ltepass.kernels.proxy_reference import quantise_token
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.passes.group.group_neurons import permute_routed
from ltepass.routed import samples
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.tiered_router import TieredRouter
from tests.models import zoo

NAMES = ("llama", "phi3", "gpt2", "own", "symbolic_trace")  # gated, fused, plain with biases, no Hugging Face model


@zoo.made_once
def tiered(name: str = "llama", **settings: Any) -> Any:
    model = zoo.build(name)
    config = ltepass.LTEConfig(router="proxy", inactive="low_bit", **settings)
    return ltepass.transform(model, None if name in zoo.HF else zoo.ids(), config, calibration=[zoo.ids(8, 16)])


def routers(model: nn.Module) -> list[TieredRouter]:
    found = Routed.of(model, "the test").routers
    assert all(isinstance(router, TieredRouter) for router in found)
    return found  # type: ignore[return-value]


def by_neuron(router: TieredRouter, x: Tensor) -> Tensor:
    """The definition, one token and one neuron at a time, in fp64. x: [n, d_model]."""
    planes, d = router.planes(), router.d_model
    high = torch.cat([dequantise(planes.high, d), dequantise(planes.down, d)]).double()
    both = high + dequantise(planes.low, d).double()
    act, y = ACTIVATIONS[router.activation], torch.zeros(len(x), d, dtype=torch.float64)
    seen = [codes.double() * float(scale) for codes, scale in zip(*quantise_token(x), strict=True)]
    for token, logits in enumerate(router.logits(x)):
        for j, logit in enumerate(logits):
            rows = both[:, j] if logit > router.threshold else high[:, j]
            if logit <= router.floor and logit <= router.threshold:
                continue
            z = [row @ seen[token] for row in rows[:-1]]
            if router.biases is not None:
                z = [unit + bias[j] for unit, bias in zip(z, router.biases, strict=True)]
            y[token] += rows[-1] * (act(z[0]) * z[1] if len(z) == 2 else act(z[0]))
    return y


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"low_bit_sparsity": 0.4, "target_sparsity": 0.9}])
def test_an_ffn_is_its_definition(name: str, settings: dict[str, Any]) -> None:
    model = tiered(name, **settings)
    assert torch.equal(zoo.logits(model), zoo.logits(zoo.build(name)))  # dense mode
    for router in routers(model):
        x = torch.randn(6, router.d_model, generator=torch.Generator().manual_seed(0))
        logits = router.logits(x)
        assert 0 < int((logits > router.threshold).sum()) < logits.numel()
        if settings:
            assert 0.1 < float((logits <= router.floor).float().mean()) < 0.7
        y = router.from_planes(x, logits).double()
        torch.testing.assert_close(y, by_neuron(router, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_planes_give_takes_the_place_of_the_hidden_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it and nothing else: with exact values in their place the model is the dense one."""
    model = tiered(name)
    routed = Routed.of(model, "the test")
    sites = dict(zip(routers(model), routed.sites, strict=True))

    def exact(router: TieredRouter, x: Tensor, logits: Tensor) -> Tensor:
        site = sites[router]
        rows = (site.gate_rows, site.gate_bias), (site.up_rows, site.up_bias)
        z = [x @ r.of(model, site.d_ff).T + (0 if b is None else b.of(model, site.d_ff)) for r, b in rows if r]
        h = ACTIVATIONS[site.activation](z[0])
        return (h * z[1] if len(z) == 2 else h) @ site.down_rows.of(model, site.d_ff)

    dense = zoo.logits(model)
    ltepass.set_mode(model, "hard")
    monkeypatch.setattr(TieredRouter, "from_planes", exact)
    torch.testing.assert_close(zoo.logits(model), dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_all_best_is_the_dense_model_but_for_rounding(name: str) -> None:
    model = tiered(name)
    dense = zoo.logits(model)
    ltepass.set_mode(model, "hard")
    ltepass.set_sparsity(model, 0.0)
    off = [float((zoo.logits(model) - dense).norm())]
    for router in routers(model):
        router.threshold.fill_(torch.inf)
    off.append(float((zoo.logits(model) - dense).norm()))
    assert off[0] < 0.02 * float(dense.norm())
    assert off[0] < 0.2 * off[1]


def test_nothing_high_is_plain_lte() -> None:
    """Without the middle tier, it is the proxy's model whose weights are the sum of the planes."""
    model, plain = tiered(low_bit_sparsity=0.999, target_sparsity=0.6), zoo.build("llama")
    ltepass.transform(plain, config=ltepass.LTEConfig(router="proxy"))
    routed = Routed.of(plain, "the test")
    for site, router, own in zip(routed.sites, routed.routers, routers(model), strict=True):
        router.load_state_dict({k: v for k, v in own.state_dict().items() if k in router.state_dict()})
        planes = own.planes()
        low = dequantise(planes.low, 24)
        both = torch.cat([dequantise(planes.high, 24), dequantise(planes.down, 24)]) + low
        with torch.no_grad():
            for rows, weight in zip((site.gate_rows, site.up_rows, site.down_rows), both, strict=True):
                assert rows is not None
                rows.of(plain, site.d_ff).copy_(weight)
        own.low_bit_sparsity = 1.0
        assert float(own.floor) == float(own.quantiles[-1])
    for one in (model, plain):
        ltepass.set_mode(one, "hard")
    off = zoo.logits(model) - zoo.logits(plain)
    assert off.norm() < 0.01 * zoo.logits(plain).norm()  # x in 8 bits


def test_a_tier_more_is_nearer_to_dense() -> None:
    def off(**settings: Any) -> float:
        model = tiered(target_sparsity=0.8, **settings)
        dense = zoo.logits(model)
        ltepass.set_mode(model, "hard")
        return float((zoo.logits(model) - dense).norm())

    kept, some = off(), off(low_bit_sparsity=0.6)
    zero = zoo.build("llama")
    ltepass.transform(zero, config=ltepass.LTEConfig(router="proxy", target_sparsity=0.8), calibration=[zoo.ids(8, 16)])
    dense = zoo.logits(zero)
    ltepass.set_mode(zero, "hard")
    assert kept < some < float((zoo.logits(zero) - dense).norm())


def test_gptq_is_nearer_than_rounding() -> None:
    """With nothing of the low plane: on inputs that go together, as here by the model's own making."""
    off = {}
    for quantiser in ("gptq", "nearest"):
        model = zoo.build("llama")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            embedding = model.get_input_embeddings().weight  # type: ignore[operator]
            embedding.copy_(
                torch.randn(len(embedding), 4, generator=generator) @ torch.randn(4, 24, generator=generator)
            )
        most: Any = {"target_sparsity": 0.999, "low_bit_quantiser": quantiser}  # codes for units that are all inactive
        config = ltepass.LTEConfig(router="proxy", inactive="low_bit", **most)
        ltepass.transform(model, config=config, calibration=[zoo.ids(8, 16)])
        dense = zoo.logits(model)
        ltepass.set_mode(model, "hard")
        for router in routers(model):
            router.threshold.fill_(torch.inf)
        off[quantiser] = float((zoo.logits(model) - dense).norm())
    assert off["gptq"] < 0.9 * off["nearest"]


def test_before_calibration_every_neuron_keeps_its_low_bits() -> None:
    model = zoo.build("llama")
    config = ltepass.LTEConfig(router="proxy", inactive="low_bit", low_bit_sparsity=0.5)
    dense = zoo.logits(ltepass.transform(model, config=config))
    ltepass.set_mode(model, "hard")
    assert all(float(router.floor) == -torch.inf for router in routers(model))
    torch.testing.assert_close(zoo.logits(model), dense, rtol=0.2, atol=0.2 * float(dense.std()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_saved_and_loaded_is_the_same_model(name: str, tmp_path: Path) -> None:
    model = tiered(name, low_bit_sparsity=0.3, target_sparsity=0.8)
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(zoo.logits(again), expected)
    assert [router.low_bit_sparsity for router in routers(again)] == [0.3, 0.3]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_it_comes_and_goes() -> None:
    for name in NAMES:
        dense = zoo.build(name)
        before = zoo.logits(dense)
        config = ltepass.LTEConfig(router="proxy", inactive="low_bit")
        model = ltepass.transform(dense, None if name in zoo.HF else zoo.ids(), config)
        ltepass.set_mode(model, "hard")
        assert not torch.equal(zoo.logits(model), before)
        copied = copy.deepcopy(model)
        assert torch.equal(zoo.logits(copied), zoo.logits(model))
        ltepass.remove(model)
        assert torch.equal(zoo.logits(model), before)
        assert not any(isinstance(m, Router) for m in model.modules())


def test_compiled_is_eager() -> None:
    model = tiered(low_bit_sparsity=0.4, target_sparsity=0.9)
    ltepass.set_mode(model, "hard")
    torch._dynamo.reset()
    expected = zoo.logits(model)
    torch.testing.assert_close(zoo.logits(torch.compile(model, backend="aot_eager")), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    model = tiered()
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    torch.testing.assert_close(zoo.logits(model.to(dtype)).float(), expected, rtol=0.05, atol=0.02)


def test_its_settings() -> None:
    for settings, says in (
        ({"inactive": "none"}, "zero, low_bit"),
        ({"inactive": "low_bit"}, "router is 'linear'"),
        ({"inactive": "low_bit", "router": "proxy", "group_size": 4}, "group_size is 4"),
        ({"inactive": "low_bit", "router": "proxy", "proxy_scales": "rows"}, "proxy_scales is 'rows'"),
        ({"inactive": "low_bit", "router": "proxy", "hidden_sparsity": 0.1}, "hidden_sparsity is 0.1"),
        ({"inactive": "low_bit", "router": "proxy", "input_sparsity": 0.1}, "input_sparsity is 0.1"),
        ({"low_bit_sparsity": 0.1}, 'low_bit_sparsity is 0.1 beside inactive="zero"'),
        ({"low_bit_quantiser": "nearest"}, 'inactive="low_bit"'),
        ({"low_bit_quantiser": "awq"}, "gptq, nearest"),
        ({"inactive": "low_bit", "router": "proxy", "low_bit_sparsity": 1.0}, "low_bit_sparsity"),
    ):
        with pytest.raises(ConfigError, match=says):
            ltepass.LTEConfig(**settings)


def test_an_ffn_that_cannot_have_tiers_is_refused_by_name() -> None:
    config = ltepass.LTEConfig(router="proxy", inactive="low_bit")
    for model, more, says in (
        (zoo.build("opt"), {}, "inline"),
        (zoo.build("llama"), {"per_site": {"*.1.mlp": {"group_size": 4}}}, "of 4 neurons"),
    ):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(ConfigError, match=f"{says}.*skip="):
            ltepass.transform(model, None, config, **more)  # type: ignore[arg-type]
        assert not any(isinstance(m, Router) for m in model.modules())
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_does_not_serve_it_says_so() -> None:
    model, batch = tiered(), zoo.ids(8, 16)
    for call in (
        lambda: ltepass.begin_stage(model, "soft", trainable="lora"),
        lambda: ltepass.set_hidden_sparsity(model, 0.1, [batch]),
        lambda: ltepass.set_input_sparsity(model, 0.1, [batch]),
        lambda: ltepass.warm_start(model, batch),
    ):
        with pytest.raises(ConfigError, match='inactive="low_bit"'):
            call()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["ffn", "model"])
def test_lowered_is_hard_eager(name: str, scope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiered(name, low_bit_sparsity=0.4, target_sparsity=0.8)
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    zoo.fresh_dynamo(monkeypatch, inductor=name == "llama")
    ltepass.lower(model, scope=scope)
    for T in (12, 1):
        x = zoo.ids()[:, :T] if name in zoo.HF else None
        with zoo.Graphs() as graphs:
            y = zoo.logits(model, x)
        if scope == "model":
            assert all(gates == lowered for gates, lowered in graphs.seen)
            assert T == 1 or sum(lowered for _, lowered in graphs.seen) == len(ltepass.report(model).sites)
        else:
            with CountTiers() as counted:
                zoo.logits(model, x)
            assert counted.calls == len(ltepass.report(model).sites)
        assert (y - expected[:, :T]).abs().max() <= 1e-5 * expected.abs().max()
        if name not in zoo.HF:
            break
    assert not ltepass.report(model).notes
    assert torch.equal(zoo.logits(ltepass.unlower(model)), expected)


class CountTiers(TorchDispatchMode):
    """Counts calls of the packed op from eager code, whichever of its names they have."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "packed_tiered_ffn" in str(func)
        return func(*args, **(kwargs or {}))


def test_lowered_reads_planes_and_thresholds_as_they_are() -> None:
    model = tiered(low_bit_sparsity=0.4, target_sparsity=0.8)
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(ltepass.lower(model))
    for router in routers(model):
        router.threshold.fill_(torch.inf)
        router.quantiles.fill_(torch.inf)
    nothing = zoo.logits(model)
    assert not torch.allclose(nothing, expected, atol=1e-3)
    assert torch.allclose(zoo.logits(ltepass.unlower(model)), nothing, atol=1e-6)


def test_planes_that_somebody_wrote_to_are_packed_again() -> None:
    model = tiered(target_sparsity=0.5)
    ltepass.set_mode(model, "hard")
    before = zoo.logits(ltepass.lower(model))
    packed = [router.packed() for router in routers(model)]
    assert all(router.packed() is known for router, known in zip(routers(model), packed, strict=True)), "once"
    copied = copy.deepcopy(model)
    assert torch.equal(zoo.logits(copied), before)
    for router in routers(model):
        router.get_buffer("low_scales").zero_()
    changed = zoo.logits(model)
    assert not torch.allclose(changed, before, atol=1e-4)
    assert torch.equal(zoo.logits(copied), before), "a copy has planes of its own"
    assert torch.allclose(zoo.logits(ltepass.unlower(model)), changed, atol=1e-6)
    assert all(router.packed_once is None for router in routers(model))


def test_what_keeps_the_op_out_of_a_graph_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiered()
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    zoo.fresh_dynamo(monkeypatch, inductor=False)
    ltepass.lower(model, scope="model")
    with torch.autocast("cpu", torch.bfloat16):
        y = zoo.logits(model)
    assert any("another shape or dtype" in note for note in ltepass.report(model).notes)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        ("down_codes", lambda t: t[..., :8].clone(), "U8"),
        ("low_codes", lambda t: t[:2].clone(), "U8"),
        ("low_scales", lambda t: t.double(), "F64"),
        ("down_scales", lambda t: None, "missing"),
        ("low_multipliers", lambda t: torch.full_like(t, 255), "low_multipliers .* 255"),
        ("down_multipliers", lambda t: torch.full_like(t, 255), "down_multipliers .* 255"),
    ],
)
def test_a_changed_plane_is_refused(tensor: str, change: Any, says: str, tmp_path: Path) -> None:
    tiered().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.mlp.router.{tensor}"
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=says):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_file_whose_sites_cannot_have_tiers_is_refused(tmp_path: Path) -> None:
    model: Any = zoo.transformed("opt", grouping="identity", router="proxy")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config"] |= {"inactive": "low_bit", "group_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="keep low bits"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"budget": "model"}])
@pytest.mark.parametrize("inputs", ["dense", "hard"])
def test_calibration_meets_both_shares(settings: dict[str, Any], inputs: Any) -> None:
    model = tiered(target_sparsity=0.9, low_bit_sparsity=0.4, **settings)
    batches = [zoo.ids(8, 16)]
    ltepass.calibrate(model, batches, inputs=inputs)
    ltepass.set_mode(model, "hard")
    least: list[Tensor] = []

    def see(router: TieredRouter, _: object, logits: Tensor) -> None:
        least.append((logits <= router.floor).float().mean())

    for router in routers(model):
        router.register_forward_hook(see)
    zoo.logits(model, batches[0])
    assert abs(float(torch.stack(least).mean()) - 0.4) < 0.05
    shares = ltepass.measure_sparsity(model, batches)
    assert abs(sum(shares.values()) / len(shares) - 0.9) < 0.03
    ltepass.set_sparsity(model, 0.7)
    shares = ltepass.measure_sparsity(model, batches)
    assert abs(sum(shares.values()) / len(shares) - 0.7) < 0.05
    assert abs(float(torch.stack(least[-2:]).mean()) - 0.4) < 0.05


def test_planes_follow_a_new_order_of_the_neurons() -> None:
    model = tiered("gpt2", low_bit_sparsity=0.4, target_sparsity=0.9)
    ltepass.set_mode(model, "hard")
    expected = zoo.logits(model)
    routed = Routed.of(model, "the test")
    for site, router in routed:
        order = torch.randperm(site.d_ff, generator=torch.Generator().manual_seed(0))
        permute_routed(routed, site, order)
        with torch.no_grad():
            router.weight.copy_(router.weight[order])
    torch.testing.assert_close(zoo.logits(model), expected, rtol=1e-4, atol=1e-6)


def test_weights_that_an_adapter_holds_are_not_made_planes_of() -> None:
    peft = pytest.importorskip("peft")
    model = tiered()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ShardedError, match="before wrapping"):
        ltepass.calibrate(adapted, [zoo.ids(4, 16)])


def test_a_turn_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [(site, router) for site, router in zip(ltepass.report(tiered()).sites, routers(tiered()), strict=True)] * 4
    turns = [len(turn) for turn in gptq._turns(sites)]
    assert turns == [2, 2, 2, 2]
    monkeypatch.setattr(samples, "BUDGET_BYTES", 1)
    assert [len(turn) for turn in gptq._turns(sites)] == [1] * 8
    assert list(gptq._turns([])) == []


def test_a_site_is_coded_for_what_the_codes_below_it_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second site's moments are of the first one's high plane; in one turn they are of both planes."""
    seen: dict[str, list[Tensor]] = {}

    def kept(turns: str) -> None:
        def codes(weights: Tensor, moment: Tensor) -> Any:
            seen.setdefault(turns, []).append(moment)
            return codes_along_inputs(weights, moment)

        monkeypatch.setattr(gptq, "codes_along_inputs", codes)

    kept("two")
    model = tiered(seed=101)  # a seed that nobody has: a copy calibrates nothing
    monkeypatch.setattr(gptq, "TURNS", 1)
    kept("one")
    tiered(seed=102)
    assert torch.equal(seen["one"][0], seen["two"][0])
    assert not torch.allclose(seen["one"][1], seen["two"][1], rtol=1e-4)
    x = []
    ltepass.set_mode(model, "hard")
    routers(model)[0].threshold.fill_(torch.inf)
    handle = routers(model)[1].register_forward_pre_hook(lambda _, args: x.append(args[0].flatten(0, 1)))
    zoo.logits(model, zoo.ids(8, 16))
    handle.remove()
    torch.testing.assert_close(seen["two"][1], x[0].T @ x[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("active", "kept"), [(0.0, [1.0, 1.0, -2.0, 3.0]), (0.5, [1.0, 0.0, 0.0, 3.0]), (1.0, [0.0, 0.0, 0.0, 0.0])]
)
def test_columns_of_down_make_up_for_inactive_units_alone(active: float, kept: list[float]) -> None:
    """Those that write most read the low plane, and lose nothing that others could make up for."""
    (site, router), *_ = Routed.of(tiered(), "the test")
    assert isinstance(router, TieredRouter)
    site = replace(site, d_ff=4)
    router.sizes = torch.tensor([1.0, 10.0, 1.0, 0.1])
    moments = gptq._Moments(site, router, active)
    moments.on_hidden(torch.tensor([[1.0, 1.0, -2.0, 3.0]]))  # they write 1, 10, 2 and 0.3
    assert torch.equal(moments.h, torch.outer(torch.tensor(kept), torch.tensor(kept)))
