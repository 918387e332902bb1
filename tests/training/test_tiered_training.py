"""The two stages of a model whose inactive neurons keep low bits: what learns, and what it computes meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ltepass
from ltepass.errors import ConfigError
from ltepass.kernels.planes import dequantise
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.kernels.tiers_reference import rounded
from ltepass.routed.tiered_router import TieredRouter
from tests.models import zoo
from tests.training.learning_cases import copied_text, dense_model, fit, perplexity_of, weights

TIERS: Any = {"router": "proxy", "inactive": "low_bit"}


@zoo.made_once
def tiered(name: str = "llama", **settings: Any) -> Any:
    config = ltepass.LTEConfig(**TIERS, low_bit_sparsity=0.3, target_sparsity=0.8, **settings)
    return ltepass.transform(zoo.build(name), config=config, calibration=[zoo.ids(8, 16)])


def routers(model: Any) -> list[TieredRouter]:
    return [module for module in model.modules() if isinstance(module, TieredRouter)]


def shared(router: TieredRouter, x: Tensor) -> Tensor:
    """The soft stage in lines, fp64: a neuron's sigmoid is the share of its low plane. x: [n, d_model]."""
    planes, d, logits = router.planes(), router.d_model, router.logits(x)
    *low, down_low = dequantise(planes.low, d).double()
    kept = (logits > router.floor).double()
    share = torch.sigmoid(logits.double()) * kept
    seen = rounded(x).double()
    highs = dequantise(planes.high, d).double()
    z = [seen @ high.T + share * (seen @ rest.T) for high, rest in zip(highs, low, strict=True)]
    if planes.biases is not None:
        z = [unit + bias for unit, bias in zip(z, planes.biases.double(), strict=True)]
    h = ACTIVATIONS[router.activation](z[0])
    h = h * z[1] if len(z) == 2 else h
    y: Tensor = (h * kept) @ dequantise(planes.down, d)[0].double() + (h * share) @ down_low
    return y


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_soft_neuron_has_its_sigmoid_of_the_low_planes(name: str) -> None:
    model = tiered(name)
    router, x = routers(model)[0], torch.randn(7, routers(model)[0].d_model)
    router.mode = "soft"
    logits = router(x)
    y = router.from_planes(x, logits)
    expected = shared(router, x)
    assert 0.2 < float((logits <= router.floor).float().mean()) < 0.5
    assert (y.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
    y.square().sum().backward()
    for learning in (router.weight, router.bias):
        assert learning.grad is not None
        assert learning.grad.abs().max() > 0


def test_the_hard_stage_computes_what_hard_mode_does_and_learns_through_the_decision_where_asked() -> None:
    model, ids = tiered(), zoo.ids()
    ltepass.set_mode(model, "hard")
    with torch.no_grad():
        expected = model(ids).logits
    for through in (False, True):
        ltepass.begin_stage(model, "hard", straight_through=through)
        model.zero_grad()
        out = model(ids)
        assert (out.logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        out.logits.square().mean().backward()
        seen = [router.weight.grad is not None and bool(router.weight.grad.any()) for router in routers(model)]
        assert seen == [through, through]
        assert bool(model.model.embed_tokens.weight.grad.any())
        linears = [model.get_parameter(rows.param) for site in ltepass.report(model).sites for rows in site.neurons]
        assert not any(weight.requires_grad for weight in linears)  # DDP waits for what learns


def test_both_stages_learn_around_the_codes_to_the_target(tmp_path: Path) -> None:
    model = dense_model()  # knows nothing of the text
    config = ltepass.LTEConfig(**TIERS, target_sparsity=0.8)
    ltepass.transform(model, config=config, calibration=copied_text(64, 5).split(16))
    before, start = weights(model), perplexity_of(model)
    fit(model, tmp_path, ltepass.LTESettings(), max_steps=30)
    after = weights(model)
    still = {name for name in before if torch.equal(before[name].nan_to_num(), after[name].nan_to_num())}
    linears = {rows.param for site in ltepass.report(model).sites for rows in site.neurons}
    constants = {name for name, _ in model.named_buffers() if name.endswith(("codes", "multipliers", "scales"))}
    assert linears | constants <= still
    assert not {name for name in before if "self_attn" in name or name.endswith("router.weight")} & still
    assert perplexity_of(model) < 0.8 * start
    shares = ltepass.measure_sparsity(model, [copied_text(64, 3)])
    assert all(abs(share - 0.8) < 0.05 for share in shares.values())
    assert all(weight.requires_grad for weight in model.parameters())  # the stages' flags are gone


def test_what_reads_or_adds_to_linears_is_refused_and_the_model_stays(tmp_path: Path) -> None:
    model = tiered()
    before = weights(model)
    with pytest.raises(ConfigError, match='trainable="lora" does not serve inactive="low_bit"'):
        ltepass.begin_stage(model, "hard", trainable="lora")
    with pytest.raises(ConfigError, match='through_op does not serve inactive="low_bit"'):
        fit(model, tmp_path, ltepass.LTESettings(through_op=True, soft_steps=0), max_steps=1)
    assert {router.mode for router in routers(model)} == {"dense"}
    assert all(torch.equal(value.nan_to_num(), weights(model)[name].nan_to_num()) for name, value in before.items())


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj"]])
def test_an_adapter_that_would_have_no_effect_is_refused(targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiered()
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=targets))
    if targets == ["q_proj"]:
        ltepass.begin_stage(adapted, "hard")
        return
    with pytest.raises(ConfigError, match=r"mlp\.down_proj\.weight is no parameter any more: an adapter"):
        ltepass.begin_stage(adapted, "hard")
    assert {router.mode for router in routers(model)} == {"dense"}
