"""One threshold for all FFNs: what the loss says each of them matters, and what that does to their sparsities."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning_cases import calibrated, dense_model, tokens
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.errors import CalibrationError, ConfigError
from ltepass.sensitivity import loss_sensitivity
from ltepass.sites import routers_of
from ltepass.training.stages import settle
from ltepass.training.warm_start import warm_start

D, FF, VOCAB = 16, 48, 31


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Weighted(nn.Module):
    """Two equal FFNs on the same input; what the second gives counts `share` of what the first does."""

    def __init__(self, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.first = FFN()
        self.second = copy.deepcopy(self.first)
        self.share = share

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(x + self.first(x) + self.share * self.second(x)))


class Logits(Weighted):
    """The same, for a tracer that wants tensors."""

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids).logits


def weighted(share: float) -> Any:
    ids = torch.randint(0, VOCAB, (2, 9))
    model = ltepass.transform(Logits(share), ids, config=ltepass.LTEConfig(group_size=4))
    inner = model.forward
    model.forward = lambda input_ids: SimpleNamespace(logits=inner(input_ids))
    return model


@pytest.mark.parametrize("share", [0.1, 3.0])
def test_sensitivity_is_the_square_of_what_an_output_counts(share: float) -> None:
    model = weighted(share)
    ids = torch.randint(0, VOCAB, (8, 20), generator=torch.Generator().manual_seed(1))
    before = {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()}
    found = {name.split(".")[0]: v for name, v in loss_sensitivity(model, [ids]).items()}
    assert found["second"] / found["first"] == pytest.approx(share**2, rel=1e-4)
    assert {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()} == before
    assert all(r.observer is None for r in routers_of(model))


def test_sensitivity_is_what_leaving_experts_out_costs() -> None:
    """By hand, for one FFN: the gradient of the same drawn labels at its output, times each expert's own output."""
    model = ltepass.transform(dense_model(), config=ltepass.LTEConfig(group_size=12, grouping="identity"))
    ids = tokens(40)
    site = model._lte.sites[1]  # the last FFN: nothing but the norm and the head come after
    found = loss_sensitivity(model, [ids], seed=3)[site.name]
    seen: dict[str, Tensor] = {}

    def on_down(module: nn.Module, args: Any, out: Tensor) -> None:
        seen["h"], seen["out"] = args[0], out
        out.retain_grad()

    handle = model.get_submodule(site.down).register_forward_hook(on_down)
    logits = model(ids).logits.flatten(0, 1)
    handle.remove()
    generator = torch.Generator().manual_seed(3)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
    F.cross_entropy(logits, labels, reduction="sum").backward()
    weight = model.get_submodule(site.down).weight.detach()  # [d_out, d_ff]
    ratios = []
    for e in range(site.n_experts):
        own = slice(12 * e, 12 * e + 12)
        h = seen["h"].detach()[..., own]
        cost = ((h @ weight[:, own].T) * seen["out"].grad).sum(-1).square()
        ratios.append(cost / (h.square() @ weight[:, own].square().sum(0)))
    assert found == pytest.approx(float(torch.stack(ratios).log().mean().exp()), rel=1e-3)


def shares_of(model: Any, target: float) -> list[float]:
    return list(settle(model, tokens(80, seed=5).split(20), target).values())


@pytest.mark.parametrize("target", [0.3, 0.6, 0.8])
def test_the_mean_meets_the_target_and_layers_differ(target: float, tmp_path: Path) -> None:
    model = calibrated(target, budget="model")
    ltepass.set_mode(model, "hard")
    at_once = ltepass.measure_sparsity(model, tokens(60).split(20))
    assert statistics.fmean(at_once.values()) == pytest.approx(target, abs=0.05)
    assert len({float(r.threshold) for r in routers_of(model)}) == 1
    values = shares_of(model, target)
    assert statistics.fmean(values) == pytest.approx(target, abs=0.01)
    assert max(values) - min(values) > 0.02
    ltepass.set_sparsity(model, target / 2)
    measured = ltepass.measure_sparsity(model, tokens(80, seed=5).split(20))
    assert statistics.fmean(measured.values()) == pytest.approx(target / 2, abs=0.04)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again._lte.config["budget"] == "model"
    assert shares_of(again, target) == pytest.approx(values, abs=2e-3)  # settled from other thresholds


def test_a_layer_that_counts_little_gives_up_more() -> None:
    model = dense_model()
    layers = model.model.layers
    with torch.no_grad():
        layers[1].mlp.load_state_dict(layers[0].mlp.state_dict())
        layers[1].post_attention_layernorm.weight.copy_(layers[0].post_attention_layernorm.weight)
        model.lm_head.weight.mul_(0.5)
    batches = tokens(60).split(20)
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=4, budget="model"), calibration=batches)
    found = loss_sensitivity(model, batches)
    ltepass.set_mode(model, "hard")
    measured = ltepass.measure_sparsity(model, batches)
    less, more = sorted(found, key=found.__getitem__)
    assert found[more] > 1.05 * found[less]
    assert measured[less] > measured[more]


def test_the_warm_start_leaves_the_shared_threshold_alone() -> None:
    model = calibrated(0.5, budget="model")
    before = [r.threshold.clone() for r in routers_of(model)]
    errors = warm_start(model, tokens(60))
    assert [r.threshold for r in routers_of(model)] == before
    assert all(0 < e < 1 for e in errors.values())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="budget is 'token'"):
        ltepass.LTEConfig(budget="token")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="router_bias=True"):
        ltepass.LTEConfig(budget="model", router_bias=False)
    ids = torch.randint(0, VOCAB, (2, 9))
    with pytest.raises(CalibrationError, match="returns no logits"):
        ltepass.transform(Logits(1.0), ids, config=ltepass.LTEConfig(group_size=4, budget="model"), calibration=[ids])
    with pytest.raises(CalibrationError, match="no batch"):
        loss_sensitivity(weighted(1.0), [])
