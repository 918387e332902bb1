"""Proxy routers: scores, calibration and training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import ltepass
from ltepass.passes.group.group_neurons import permute_routed
from ltepass.routed.routed import Routed
from tests.models import zoo
from tests.models.proxied import masks, proxied, routers


def test_single_neurons_unless_asked_otherwise() -> None:
    assert {site.group_size for site in ltepass.report(proxied()).sites} == {1}
    assert {site.group_size for site in ltepass.report(proxied(group_size=5)).sites} == {5}
    model = zoo.build("llama")
    config = ltepass.LTEConfig(router="proxy")
    ltepass.transform(model, config=config, per_site={"*.0.mlp": {"group_size": 4}})
    assert [site.group_size for site in ltepass.report(model).sites] == [4, 1]
    assert {site.group_size for site in ltepass.report(zoo.transformed("llama")).sites} == {4}  # linear ones as before


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_scores_are_what_experts_add(name: str, group_size: int) -> None:
    """Against the exact hidden units: the experts that are chosen are nearly those that an oracle chooses."""
    model = proxied(name, group_size=group_size, grouping="identity")
    routed = Routed.of(model, "the test")
    for site, router in routed:
        x = torch.randn(200, site.d_model, generator=torch.Generator().manual_seed(0))
        up, gate = (None if r is None else r.of(model, site.d_ff) for r in (site.up_rows, site.gate_rows))
        assert up is not None
        h = nn.functional.relu(x @ up.T + site.up_bias.of(model, site.d_ff)) if site.up_bias else None
        h = nn.functional.silu(x @ gate.T) * (x @ up.T) if gate is not None else h
        assert h is not None
        sizes = (h.abs() * site.down_rows.of(model, site.d_ff).norm(dim=1)).unflatten(-1, (-1, group_size)).norm(dim=-1)
        scores = router.logits(x)
        with torch.no_grad():
            same = torch.corrcoef(torch.stack([scores.flatten(), sizes.flatten()]))[0, 1]
        assert same > 0.98


@pytest.mark.parametrize("settings", [{}, {"budget": "model"}, {"tau": 0.3}, {"group_size": 4}])
def test_calibration_meets_the_target_with_logits_that_a_sigmoid_can_use(settings: dict[str, Any]) -> None:
    model = proxied(target_sparsity=0.6, **settings)
    batches = [zoo.ids(4, 16)]
    shares = ltepass.measure_sparsity(model, batches)
    mean = sum(shares.values()) / len(shares)
    assert abs(mean - 0.6) < 0.05
    assert all(share > 0.3 for share in shares.values())
    for router in routers(model):
        tau = torch.tensor(settings.get("tau", 0.5))
        torch.testing.assert_close(router.threshold, torch.logit(tau))
        quartiles = router.quantiles[75] - router.quantiles[25]
        assert 1.0 < quartiles < 8.0
    ltepass.set_sparsity(model, 0.9)
    shares = ltepass.measure_sparsity(model, batches)
    assert abs(sum(shares.values()) / len(shares) - 0.9) < 0.04
    ltepass.calibrate(model, batches, inputs="hard")
    shares = ltepass.measure_sparsity(model, batches)
    assert abs(sum(shares.values()) / len(shares) - 0.6) < 0.05


def test_a_relu_that_is_mostly_zero_can_be_calibrated() -> None:
    model = zoo.build("opt")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("fc1.bias"):
                p.fill_(-0.05)
    config = ltepass.LTEConfig(router="proxy", target_sparsity=0.9)
    ltepass.transform(model, config=config, calibration=[zoo.ids(4, 16)])
    assert all(router.sizes.isfinite().all() and router.sizes.max() > 0 for router in routers(model))
    shares = ltepass.measure_sparsity(model, [zoo.ids(4, 16)])
    assert all(share >= 0.85 for share in shares.values())


def test_both_stages_learn() -> None:
    """Soft: the loss falls, the scale and the bias of each site move, and codes do not. Hard: routers stand still."""
    model: Any = proxied(target_sparsity=0.7)
    ids = zoo.ids(8, 16)
    before = copy.deepcopy({name: p for router in routers(model) for name, p in router.state_dict().items()})
    ltepass.begin_stage(model, "soft")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses, sparsities = [], []
    for _ in range(12):
        optimizer.zero_grad()
        task = model(input_ids=ids, labels=ids).loss
        auxiliary = ltepass.take_auxiliary(model, ltepass.label_mask(ids))
        loss = task + (2.0 * auxiliary.efficiency + 1e-4 * auxiliary.separability) / auxiliary.tokens
        loss.backward()
        assert all(
            grad is not None and grad.abs().max() > 0 for r in routers(model) for grad in (r.weight.grad, r.bias.grad)
        )
        optimizer.step()
        losses.append(float(loss.detach()))
        sparsities.append(float(auxiliary.sparsity / auxiliary.tokens))
    assert losses[-1] < losses[0] - 0.1
    assert sparsities[-1] > sparsities[0]
    after = {name: p for router in routers(model) for name, p in router.state_dict().items()}
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {"weight", "bias"}
    shares = ltepass.settle(model, [{"input_ids": ids}], 0.7)
    assert all(abs(share - 0.7) < 0.05 for share in shares.values())
    codes = routers(model)[0].codes.clone()
    assert not torch.equal(codes, before["codes"])  # of the weights as they are now
    ltepass.begin_stage(model, "hard")
    assert not any(p.requires_grad for router in routers(model) for p in router.parameters())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    hard = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        hard.append(float(loss.detach()))
    assert hard[-1] < hard[0] - 0.1


def test_the_trainer_runs_both_stages(tmp_path: Path) -> None:
    model = proxied(target_sparsity=0.7)
    rows = [{"input_ids": row, "labels": row} for row in zoo.ids(8, 16)]
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-3, logging_steps=1
    )
    lte = ltepass.LTESettings(soft_steps=4, hard_steps=4)
    trainer = ltepass.LTETrainer(model, arguments, train_dataset=rows, eval_dataset=rows, lte=lte)
    trainer.fit()
    shares = ltepass.measure_sparsity(model, [zoo.ids(8, 16)])
    assert all(abs(share - 0.7) < 0.1 for share in shares.values())


def test_straight_through_and_through_op() -> None:
    ids = zoo.ids(4, 16)
    model: Any = proxied()
    ltepass.begin_stage(model, "hard", straight_through=True)
    model(input_ids=ids, labels=ids).loss.backward()
    learned = [p.grad for router in routers(model) for p in router.parameters()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in learned)
    plain, through = proxied(), proxied()
    ltepass.begin_stage(plain, "hard")
    ltepass.begin_stage(through, "hard")
    ltepass.lower(through)
    grads = []
    for one in (plain, through):
        one(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad for p in one.parameters() if p.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 4])
def test_codes_follow_a_new_order_of_the_neurons(group_size: int) -> None:
    model = proxied("opt", group_size=group_size, grouping="identity")
    ltepass.set_mode(model, "hard")
    routed = Routed.of(model, "the test")
    before, expected = masks(model), zoo.logits(model)
    experts = torch.randperm(60 // group_size, generator=torch.Generator().manual_seed(0))
    order = (experts[:, None] * group_size + torch.arange(group_size)).flatten()
    for site, router in routed:
        permute_routed(routed, site, order)
        with torch.no_grad():
            router.weight.copy_(router.weight[experts])
    for old, new in zip(before, masks(model), strict=True):
        assert torch.equal(old[..., experts], new)
    torch.testing.assert_close(zoo.logits(model), expected, rtol=1e-4, atol=1e-6)
