"""The baselines: each rule against its definition by hand, its sparsity, its bytes, and what it must never do."""

from __future__ import annotations

import statistics
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import ltepass
from examples.compare.methods import RULES
from examples.compare.predictors import Predictor
from examples.compare.rule_hooks import Ruled, collect
from examples.compare.rules import Cats, NoisyTopK, PrunePath, Rule, Seen, Teal, TopK, spread, top
from ltepass.measure.quality import perplexity
from tests.training.learning_cases import copied_text, trained
from tests.typed import grad, present

R = TypeVar("R", bound=Rule)
EXACT_COUNT = ("topk", "oracle", "random", "moefication", "dejavu", "noisy-topk")
BY_THRESHOLD = ("cats", "teal", "prunepath")


def ruled(name: str, sparsity: float = 0.5, model: Any = None) -> Ruled:
    model = trained() if model is None else model
    samples = collect(model, copied_text(64, 5).split(16))
    out = Ruled(model, RULES[name], sparsity)
    out.calibrate(samples)
    model.eval()
    return out


def rule_of(r: Ruled, kind: type[R]) -> R:
    """The rule at the first FFN."""
    rule = r.rules[0]
    assert isinstance(rule, kind)
    return rule


def logits(r: Ruled, x: Tensor) -> Tensor:
    with torch.no_grad(), r:
        out: Tensor = r.model(x).logits
        return out


def test_the_dense_rule_changes_nothing_and_every_rule_leaves_the_model_as_it_was() -> None:
    model, x = trained(), copied_text(4, 3)
    ltepass.set_mode(model, "dense")
    with torch.no_grad():
        dense = model(x).logits
    names = {n for n, _ in model.named_parameters()}
    for name in RULES:
        r = ruled(name, model=model)
        same = torch.equal(logits(r, x), dense)
        assert same == (name == "dense"), name
        r.take_off()
        with torch.no_grad():
            assert torch.equal(model(x).logits, dense), name
        assert {n for n, _ in model.named_parameters()} == names


@pytest.mark.parametrize("name", ["topk", "oracle", "moefication", "dejavu", "random"])
def test_with_every_expert_kept_it_is_the_dense_model(name: str) -> None:
    r, x = ruled(name, 0.0), copied_text(4, 3)
    ltepass.set_mode(r.model, "dense")
    with torch.no_grad():
        dense = r.model(x).logits
    torch.testing.assert_close(logits(r, x), dense)


@pytest.mark.parametrize("sparsity", [0.5, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.25, 0.75))])
@pytest.mark.parametrize("name", [*EXACT_COUNT, *BY_THRESHOLD])
def test_measured_sparsity_is_what_was_asked_for(name: str, sparsity: float) -> None:
    r = ruled(name, sparsity)
    logits(r, copied_text(32, 3))
    measured, read = r.measured()
    assert measured == pytest.approx(sparsity, abs=1e-6 if name in EXACT_COUNT else 0.05)
    # weights left out save their bytes, the rule's own weights cost theirs
    own = sum(p.numel() for p in r.rules[0].parameters()) / (3 * 12 * 128)
    expected = (1 + 2 * (1 - measured)) / 3 if name == "cats" else 1 - measured + own
    noise = rule_of(r, NoisyTopK).noise.numel() / (3 * 12 * 128) if name == "noisy-topk" else 0.0
    assert read == pytest.approx(expected - noise, abs=1e-5)


def ffn(model: Any) -> Any:
    return model.model.layers[0].mlp


def by_hand(r: Ruled, x: Tensor) -> Tensor:
    """What the first FFN gives for x under the rule."""
    with torch.no_grad(), r:
        out: Tensor = ffn(r.model)(x)
        return out


def test_cats_drops_neurons_by_the_activated_gate() -> None:
    r = ruled("cats")
    mlp, x = ffn(r.model), torch.randn(1, 5, 12)
    with torch.no_grad():
        gate = nn.functional.silu(mlp.gate_proj(x))
        expected = mlp.down_proj(gate * mlp.up_proj(x) * (gate.abs() > rule_of(r, Cats).cut))
    torch.testing.assert_close(by_hand(r, x), expected)


def test_teal_drops_small_inputs_of_each_matrix() -> None:
    r = ruled("teal")
    mlp, x = ffn(r.model), torch.randn(1, 5, 12)
    with torch.no_grad():
        kept = x * (x.abs() > rule_of(r, Teal).cut_x)
        h = nn.functional.silu(mlp.gate_proj(kept)) * mlp.up_proj(kept)
        expected = mlp.down_proj(h * (h.abs() > rule_of(r, Teal).cut_h))
    torch.testing.assert_close(by_hand(r, x), expected)


def test_the_oracle_keeps_the_experts_with_most_energy() -> None:
    r = ruled("oracle")
    mlp, x = ffn(r.model), torch.randn(1, 5, 12)
    with torch.no_grad():
        h = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        out = torch.zeros(1, 5, 12)
        for t in range(5):
            parts = [(h[0, t, e * 4 : e * 4 + 4], mlp.down_proj.weight[:, e * 4 : e * 4 + 4]) for e in range(32)]
            energy = [float((a.square() * w.square().sum(0)).sum()) for a, w in parts]
            for e in sorted(range(32), key=lambda e: -energy[e])[:16]:
                out[0, t] += parts[e][1] @ parts[e][0]
    torch.testing.assert_close(by_hand(r, x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_oracle_loses_least_and_random_experts_most() -> None:
    lost = {}
    for name in ("oracle", "moefication", "random"):
        r = ruled(name)
        with r:
            lost[name] = perplexity(r.model, copied_text(16, 2))
    assert lost["oracle"] < lost["moefication"] < lost["random"], lost


@pytest.mark.parametrize(
    "sparsity", [pytest.param(0.3, marks=pytest.mark.slow), 0.5]
)  # above, 12 inputs are too few for any linear router on this toy
def test_a_calibrated_start_is_within_five_percent_of_a_post_hoc_mlp_router(sparsity: float) -> None:
    """At the same active experts; the start costs a few passes, the MLP 600 steps of Adam at every FFN."""
    predicted = ruled("moefication", sparsity)
    with predicted:
        after = perplexity(predicted.model, copied_text(64, 2))
    model = trained()
    model._lte.config["target_sparsity"] = sparsity
    ltepass.calibrate(model, copied_text(64, 5).split(16), inputs="hard")
    ltepass.set_mode(model, "hard")
    measured = ltepass.measure_sparsity(model, [copied_text(64, 2)])
    assert statistics.fmean(measured.values()) == pytest.approx(sparsity, abs=0.02)
    assert perplexity(model, copied_text(64, 2)) < 1.05 * after


@pytest.mark.slow
def test_predictors_know_more_than_chance() -> None:
    """Overlap of the chosen with the truly most important ones, half of all: chance is a half."""
    for name in ("moefication", "dejavu"):
        r = ruled(name)
        model, rule = r.model, rule_of(r, Predictor)
        ((x, gate, h), *_) = collect(model, copied_text(16, 3).split(8))
        seen = Seen(x.float(), gate.float(), h.float())
        with torch.no_grad():
            chosen = rule.factors(seen)
            importance = rule.labels(model, seen.h)
        wanted = spread(top(importance, rule.n_active), 128) if name == "moefication" else importance
        assert float((chosen * wanted).sum() / wanted.sum()) > 0.56, name


def test_noisy_topk_weighs_the_kept_experts_and_is_noisy_in_training_only() -> None:
    r = ruled("noisy-topk")
    rule, seen = rule_of(r, NoisyTopK), Seen(x := torch.randn(7, 12), x, torch.randn(7, 128))
    with torch.no_grad():
        rule.eval()
        first, again = rule.factors(seen), rule.factors(seen)
        rule.train()
        noisy = rule.factors(seen)
    assert torch.equal(first, again)
    assert not torch.equal(first, noisy)
    assert torch.allclose(first[:, ::4].sum(1), torch.full((7,), 16.0))  # softmax over 16 of 32, times 16
    (rule.factors(seen) * torch.randn(7, 128)).sum().backward()  # unweighted, the factors of a token sum to a constant
    assert rule.weight.grad is not None
    assert float(rule.weight.grad.abs().sum()) > 1


def test_prunepath_keeps_experts_up_to_its_mass() -> None:
    rule = rule_of(ruled("prunepath"), PrunePath)
    share = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    for mass, kept in ((0.4, [1, 0, 0, 0]), (0.6, [1, 0, 1, 0]), (0.85, [1, 1, 1, 0])):
        rule.mass = mass
        assert rule._kept(share).sum() == sum(kept)
        assert rule._kept(share)[0, [0, 2]].tolist() == [kept[0], kept[2]]


def test_prunepath_learns_from_its_scores_and_not_through_the_input() -> None:
    """A gradient that came back through the router would grow with every layer: it once overflowed on 30 of them."""
    rule = rule_of(ruled("prunepath"), PrunePath).train()
    x, h = torch.randn(50, 12, requires_grad=True), torch.randn(50, 128)
    logits = rule.logits(Seen(x.detach(), h, h)).detach()
    kept = rule._kept(logits.softmax(-1))
    weights = torch.randn(50, 128)
    (rule.factors(Seen(x, h, h)) * weights).sum().backward()
    assert x.grad is None
    pulled = kept * weights.unflatten(-1, (32, 4)).sum(-1)  # what each expert's factor is pulled by
    expected = pulled - logits.softmax(-1) * pulled.sum(-1, keepdim=True)
    torch.testing.assert_close(rule.bias.grad, expected.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["noisy-topk", "prunepath"])
def test_balance_losses_are_least_where_all_experts_get_alike(name: str) -> None:
    rule = rule_of(ruled(name), TopK).eval()
    with torch.no_grad():
        rule.weight.zero_()
        even = Seen(x := torch.randn(50, 12), x, torch.randn(50, 128))
        losses = []
        for tilt in (0.0, 1.0, 3.0):
            rule.bias.copy_(tilt * torch.linspace(-1, 1, 32))
            rule.factors(even)
            losses.append(float(present(rule.extra)))
    assert losses[1] < losses[2]
    if name == "noisy-topk":  # a top-k of equal logits is itself uneven
        assert losses[2] > 0
    else:
        assert losses[0] <= losses[1]


@pytest.mark.parametrize("name", ["noisy-topk", "prunepath"])
def test_trained_rules_get_gradients_through_the_whole_model(name: str) -> None:
    r, x = ruled(name), copied_text(4, 3)
    r.model.train()
    with r:
        loss = r.model(input_ids=x, labels=x).loss + r.extra_loss()
    loss.backward()
    assert all(float(grad(rule.get_parameter("weight")).abs().sum()) > 0 for rule in r.rules)
    assert float(ffn(r.model).down_proj.weight.grad.abs().sum()) > 0
