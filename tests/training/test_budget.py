"""One threshold for all FFNs: what the loss says each of them matters, and what that does to their sparsities."""

from __future__ import annotations

import copy
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.calibration import initialise
from ltepass.calibration.energy import fit_energies
from ltepass.calibration.refit_down import warm_start
from ltepass.calibration.sensitivity import loss_sensitivity, sensitivities
from ltepass.errors import CalibrationError, ConfigError
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.samples import collect
from ltepass.training.stages import settle
from tests.training.learning_cases import calibrated, dense_model, router_inputs, tokens
from tests.typed import grad, lte_state, routed

D, FF, VOCAB = 16, 48, 31


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Any:
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


class Rare(Weighted):
    """Its second FFN runs for batches that begin with a 0."""

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        out = x + self.first(x)
        return SimpleNamespace(logits=self.head(out + self.second(x) if input_ids[0, 0] == 0 else out))


@pytest.mark.parametrize("inputs", ["dense", "hard"])
@pytest.mark.parametrize("budget", ["layer", "model"])
@pytest.mark.parametrize("place", [3, 9])
def test_an_ffn_that_one_batch_runs_through_is_started_from_it(place: int, budget: Any, inputs: Any) -> None:
    """Within the tokens that costs are taken from, and after them; no part that would be enough otherwise has it."""
    batches = [torch.randint(1, VOCAB, (8, 40), generator=torch.Generator().manual_seed(s)) for s in range(16)]
    config = ltepass.LTEConfig(group_size=4, grouping="identity", budget=budget, target_sparsity=0.6)
    model = ltepass.transform(Logits(1.0), batches[0], config=config)
    model.forward = Rare.forward.__get__(model)
    with pytest.raises(CalibrationError, match=r"no token reached second \(1 of 2 sites\)"):
        ltepass.calibrate(model, batches, inputs=inputs)
    batches[place][0, 0] = 0
    ltepass.calibrate(model, batches, inputs=inputs)
    router = router_of(model, lte_state(model).sites[1])
    x = model.get_submodule("embed")(batches[place])
    share = (F.linear(x, router.weight, router.bias) <= router.threshold).float().mean()
    assert float(share) == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize("share", [0.1, 3.0])
def test_sensitivity_is_the_square_of_what_an_output_counts(share: float) -> None:
    model = weighted(share)
    ids = torch.randint(0, VOCAB, (8, 20), generator=torch.Generator().manual_seed(1))
    before = {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()}
    found = {name.split(".")[0]: v for name, v in loss_sensitivity(model, [ids]).items()}
    assert found["second"].log_cost - found["first"].log_cost == pytest.approx(math.log(share**2), abs=1e-4)
    torch.testing.assert_close(found["second"].neurons, found["first"].neurons)  # it looks the same way
    assert {n: (p.grad, p.requires_grad) for n, p in model.named_parameters()} == before
    assert all(r.observer is None for r in routers_of(model))


def test_sensitivity_is_what_leaving_experts_out_costs() -> None:
    """By hand, for one FFN: the gradient of the same drawn labels at its output, times each expert's own output."""
    model = ltepass.transform(dense_model(), config=ltepass.LTEConfig(group_size=12, grouping="identity"))
    ids = tokens(40)
    site = lte_state(model).sites[1]  # the last FFN: nothing but the norm and the head come after
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
    weight = model.get_parameter(f"{site.down}.weight").detach()  # [d_out, d_ff]
    g, costs = grad(seen["out"]), []
    for e in range(site.n_experts):
        own = slice(12 * e, 12 * e + 12)
        costs.append(((seen["h"].detach()[..., own] @ weight[:, own].T) * g).sum(-1).square())
    assert found.log_cost == pytest.approx(float(torch.stack(costs).log().mean()), rel=1e-3)
    unit = F.normalize(g.flatten(0, 1), dim=1)
    torch.testing.assert_close(found.neurons, len(weight) * (unit @ weight).square().mean(0), rtol=1e-3, atol=1e-6)


def test_routers_start_from_what_the_loss_hears() -> None:
    """Half of an FFN's neurons write where the head does not look: their experts are left out first."""
    model = dense_model()
    deaf = torch.arange(model.config.hidden_size) % 2 == 0
    with torch.no_grad():
        model.lm_head.weight[:, deaf] = 0
        down = model.model.layers[1].mlp.down_proj.weight  # the last FFN: only the norm and the head come after
        half = down.shape[1] // 2
        down[~deaf, :half] = 0
        down[deaf, half:] = 0
    config = {
        budget: ltepass.LTEConfig(group_size=4, grouping="identity", budget=budget) for budget in ("layer", "model")
    }
    shares = {}
    for budget, c in config.items():
        again = copy.deepcopy(model)
        ltepass.transform(again, config=c, calibration=tokens(60).split(20))
        site = again._lte.sites[1]
        x = collect(routed(again), [tokens(60)])[site.name].x.float()
        router = router_of(again, site)
        active = F.linear(x, router.weight, router.bias) > router.threshold
        first, second = active.float().mean(0).chunk(2)
        shares[budget] = float(first.mean()), float(second.mean())
    assert shares["model"][0] < 0.1 < 0.2 < shares["model"][1]
    assert min(shares["layer"]) > 0.3  # |down_j| alone tells them not apart


def test_sites_compare_by_their_log_cost_whichever_inputs_they_are_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean logits on the inputs of the last fit differ between sites by the scale times the log cost, and no more."""
    last: list[Any] = []
    fit = fit_energies

    def keep(model: Any, batches: Any, weights: Any, mode: Any) -> Any:
        before = copy.deepcopy(model)
        last[:] = [before, fit(model, batches, weights, mode)]
        return dict(last[1])

    costs: dict[str, Any] = {}

    def keep_costs(model: Any, batches: Any) -> Any:
        assert len(batches) == 1
        costs.update(sensitivities(model, batches))
        return costs

    monkeypatch.setattr(initialise, "fit_energies", keep)
    monkeypatch.setattr(initialise, "sensitivities", keep_costs)
    model, batches = dense_model(layers=6), tokens(200).split(25)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(3.0)
    config = ltepass.LTEConfig(group_size=4, grouping="identity", budget="model", target_sparsity=0.8)
    ltepass.transform(model, config=config)
    ltepass.calibrate(model, batches, inputs="hard")
    before, fits = last
    seen = router_inputs(before.model, batches, "hard")
    rest = []
    for site in model._lte.sites:
        router = router_of(model, site)
        scale = float(router.weight.detach().norm() / fits[site.name].weight.norm())
        logits = F.linear(seen[site.name], router.weight, router.bias)
        rest.append(float(logits.detach().mean()) - scale * costs[site.name].log_cost)
    assert max(rest) - min(rest) < 0.02


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
    less, more = sorted(found, key=lambda name: found[name].log_cost)
    assert found[more].log_cost > found[less].log_cost + 0.05
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
    without = ltepass.transform(dense_model(), config=ltepass.LTEConfig(group_size=4, router_bias=False))
    settle(without, [tokens(8)], 0.5, budget="model")
    with pytest.raises(ConfigError, match="router_bias=True"):
        ltepass.calibrate(without, [tokens(8)])
    with pytest.raises(CalibrationError, match="returns no logits"):
        ltepass.transform(Logits(1.0), ids, config=ltepass.LTEConfig(group_size=4, budget="model"), calibration=[ids])
    with pytest.raises(CalibrationError, match="no batch"):
        loss_sensitivity(weighted(1.0), [])
