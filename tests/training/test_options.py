"""The stages' options: each test fails if its option did nothing, and says what it must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ltepass
from ltepass.errors import ConfigError
from ltepass.kernels import routed_ffn_backward
from ltepass.measure.sparsity import measure_union
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.soft_losses import union_per_token
from ltepass.training.distillation import kl_from
from ltepass.training.lora import ffn_linears
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage, settle
from tests.training.learning_cases import copied_text, fit, perplexity_of, trained
from tests.typed import grad, lte_state, prefixed, present, routed


def changed(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize("trainable", ["all", "lora", "routers"])
def test_what_learns_is_what_was_asked_for(tmp_path: Path, stage: str, trainable: Any) -> None:
    model = trained()
    before, kinds = parameters(model), {n: type(m) for n, m in model.named_modules()}
    soft, hard = (3, 0) if stage == "soft" else (0, 3)
    fit(model, tmp_path, LTESettings(trainable=trainable, soft_steps=soft, hard_steps=hard))
    moved = changed(before, model)
    routers = {n for n in before if ".router." in n}
    linears = {f"{path}.weight" for path in ffn_linears(routed(model))}
    base = {"all": before.keys() - routers, "lora": linears, "routers": set()}[trainable]
    assert moved == base | (routers if stage == "soft" or trainable == "routers" else set())
    assert {n: type(m) for n, m in model.named_modules()} == kinds  # nothing of peft is left
    assert not any(
        r.straight_through or r.recorder.count_inactive or r.recorder.share_neighbours for r in routers_of(model)
    )


def test_lora_learns_a_low_rank_update_of_that_rank(tmp_path: Path) -> None:
    model = trained()
    before = parameters(model)
    fit(model, tmp_path, LTESettings(trainable="lora", lora_rank=3, soft_steps=0, hard_steps=5))
    for path in ffn_linears(routed(model)):
        change = (model.get_parameter(f"{path}.weight") - before[f"{path}.weight"]).double()
        singular = torch.linalg.svdvals(change)
        assert singular[2] > 1e-6
        assert singular[3] < 1e-3 * singular[0], path


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_every_hard_stage_lowers_held_out_perplexity(tmp_path: Path, trainable: Any) -> None:
    model = trained(0.8)
    before = perplexity_of(model)
    fit(model, tmp_path, LTESettings(trainable=trainable, soft_steps=0, hard_steps=40))
    assert perplexity_of(model) < 0.9 * before


def test_straight_through_is_the_hard_value_with_the_routers_gradient() -> None:
    model, x = trained(), copied_text(2, 3)
    ltepass.set_mode(model, "hard")
    hard = model(x).logits
    begin_stage(model, "hard", straight_through=True)
    assert torch.equal(model(x).logits, hard)
    model(input_ids=x, labels=x).loss.backward()
    assert all(float(grad(r.weight).abs().sum()) > 0 for r in routers_of(model))
    begin_stage(model, "hard")
    assert not any(p.requires_grad for r in routers_of(model) for p in r.parameters())


def test_straight_through_moves_routers_towards_a_lower_loss(tmp_path: Path) -> None:
    """The same steps and frozen weights: what differs is the routers alone."""
    model = trained(0.8)
    frozen = perplexity_of(model)
    fit(model, tmp_path, LTESettings(trainable="routers", soft_steps=0, hard_steps=40))
    assert perplexity_of(model) < frozen


def test_distillation_learns_the_teacher_and_not_the_labels(tmp_path: Path) -> None:
    """Labels are noise: only a student that listens to the teacher alone comes closer to it."""
    distances = {}
    for share in (0.0, 1.0):
        model = trained(0.8)
        x = copied_text(16, 7)
        with torch.no_grad(), mode_of(routed(model), "dense"):
            teacher = model(x).logits
        settings = LTESettings(distill=share, soft_steps=0, hard_steps=30)
        fit(model, tmp_path / str(share), settings, labels=torch.randint(0, 61, (512, 32)))
        with torch.no_grad():
            distances[share] = float(kl_from(teacher, model(x).logits).mean())
    start = trained(0.8)
    ltepass.set_mode(start, "hard")
    with torch.no_grad():
        untrained = float(kl_from(teacher, start(x).logits).mean())
    assert distances[1.0] < 0.8 * untrained < distances[0.0]


def test_kl_is_torchs() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 11, generator=g) for _ in range(2))
    expected = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_from(p, q), expected)
    assert float(kl_from(p, p).abs().max()) < 1e-6


def test_the_union_term_makes_neighbours_share_experts_at_the_same_sparsity(tmp_path: Path) -> None:
    shared = {}
    x = [copied_text(16, 8)]
    for coefficient in (0.0, 200.0):
        model = trained()
        fit(model, tmp_path / str(coefficient), LTESettings(union=coefficient, lam=0.0, soft_steps=40, hard_steps=0))
        settle(model, x, 0.5)
        union = measure_union(model, x, window=4)
        shared[coefficient] = sum(union.values()) / len(union)
    assert shared[200.0] > shared[0.0] + 0.03, shared


def test_union_is_the_squared_change_between_neighbours() -> None:
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    scores = torch.sigmoid(logits)
    expected = torch.zeros(2, 5)
    for b in range(2):
        for t in range(1, 5):
            expected[b, t] = sum((scores[b, t, i] - scores[b, t - 1, i]) ** 2 for i in range(3)) / 3
    torch.testing.assert_close(union_per_token(logits), expected)
    assert union_per_token(logits[0, 0]).shape == ()


def test_measured_union_counts_experts_that_a_whole_window_leaves_out() -> None:
    model, x = trained(), copied_text(2, 3)
    ltepass.set_mode(model, "hard")
    site = model._lte.sites[0]
    rows: list[torch.Tensor] = []
    router = router_of(model, site)
    hook = router.register_forward_hook(lambda m, a, logits: rows.append(logits.detach()))
    with torch.no_grad():
        model(x)
    hook.remove()
    off = rows[0] <= router.threshold
    windows = [off[b, t : t + 3].all(0).float().mean() for b in range(2) for t in range(off.shape[1] - 2)]
    assert measure_union(model, [x], window=3)[site.name] == pytest.approx(float(torch.stack(windows).mean()))
    single, plain = measure_union(model, [x], window=1), ltepass.measure_sparsity(model, [x])
    assert single == pytest.approx(plain)


def test_the_hard_stage_through_the_op_ends_where_the_masked_form_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same thresholds, held by the same measured shares, and weights equal but for the order of sums."""
    calls: list[int] = []
    per_expert = routed_ffn_backward.per_expert

    def counted(*args: Any) -> Any:
        calls.append(1)
        return per_expert(*args)

    monkeypatch.setattr(routed_ffn_backward, "per_expert", counted)
    monkeypatch.setattr(routed_ffn_backward, "LEAST_TOKENS", 1)
    ends = []
    for through_op in (False, True):
        model = trained(0.75, group_size=32)
        start = parameters(model)
        settings = LTESettings(soft_steps=0, hard_steps=5, through_op=through_op)
        trainer = fit(model, tmp_path / str(through_op), settings)
        assert model._lte.lowered is None
        assert all(p.is_contiguous() for p in model.parameters())
        assert bool(calls) == through_op
        moved = {n: p.detach() - start[n] for n, p in model.named_parameters()}
        ends.append((moved, [r.threshold.clone() for r in routers_of(model)], trainer.state.log_history))
    (masked, thresholds, log), (op, op_thresholds, op_log) = ends
    for name, change in masked.items():
        torch.testing.assert_close(op[name], change, rtol=1e-2, atol=1e-5, msg=prefixed(name))
    torch.testing.assert_close(op_thresholds, thresholds, rtol=1e-4, atol=1e-4)
    seen = [[entry["lte_hard_sparsity"] for entry in log if "loss" in entry] for log in (log, op_log)]
    assert seen[0] == pytest.approx(seen[1], abs=1e-3)


def test_a_straight_through_router_cannot_learn_through_the_op() -> None:
    for bad in ({"straight_through": True}, {"trainable": "routers"}, {"trainable": "lora"}):
        with pytest.raises(ConfigError, match="through_op"):
            LTESettings(through_op=True, **bad)


@pytest.mark.parametrize("budget", ["layer", "model"])
def test_a_budget_is_met_by_every_layer_or_by_their_mean(budget: Any) -> None:
    model = trained()
    with torch.no_grad():
        present(router_of(model, lte_state(model).sites[0]).bias).add_(1.0)  # one layer asks for more than the other
    shares = settle(model, copied_text(64, 4).split(16), 0.6, budget=budget)
    values = list(ltepass.measure_sparsity(model, [copied_text(64, 5)]).values())
    assert sum(values) / len(values) == pytest.approx(0.6, abs=0.01)
    if budget == "layer":
        assert all(v == pytest.approx(0.6, abs=0.02) for v in values)
    else:
        assert values[0] < values[1] - 0.1
        assert len({float(r.threshold) for r in routers_of(model)}) == 1
    assert shares.keys() == {s.name for s in model._lte.sites}


@pytest.mark.parametrize(
    "bad",
    [{"trainable": "some"}, {"budget": "token"}, {"distill": 1.5}, {"union": -1.0}, {"lora_rank": 0}, {"lam": -0.5}],
)
def test_settings_are_checked_when_made(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        LTESettings(**bad)
