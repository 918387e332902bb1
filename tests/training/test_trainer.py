"""LTETrainer: exact auxiliary gradient, sparsity on target after both stages, refusals, resuming."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import ltepass
from ltepass.errors import LoweredError, TrainingError
from ltepass.routed.routed import routers_of
from ltepass.routed.soft_losses import SEPARABILITY_CLAMP, per_token_losses
from ltepass.training.controller import SparsityController
from ltepass.training.labels import label_mask
from ltepass.training.stages import begin_stage
from ltepass.training.trainer import LTESettings, LTETrainer
from tests.models.zoo import made_once
from tests.training.learning_cases import copied_text, fit, perplexity_of, trained

VOCAB, LENGTH = 37, 24


def text(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences with something to learn: each token is a fixed function of the one before, with some noise."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCAB, (n, LENGTH), generator=g)
    for t in range(1, LENGTH):
        keep = torch.rand(n, generator=g) < 0.9
        rows[:, t] = torch.where(keep, (rows[:, t - 1] * 5 + 3) % VOCAB, rows[:, t])
    return [{"input_ids": r, "labels": r.clone()} for r in rows]


@made_once
def model(target: float = 0.5, calibrate: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    m = LlamaForCausalLM(config).eval()
    batches = [torch.stack([x["input_ids"] for x in text(64, 5)])] if calibrate else None
    return ltepass.transform(m, config=ltepass.LTEConfig(group_size=8, target_sparsity=target), calibration=batches)


def trainer(m: Any, folder: Path, lte: LTESettings | None = None, n: int = 640, **kwargs: Any) -> LTETrainer:
    options = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "max_steps": 40,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    args = TrainingArguments(output_dir=str(folder), **{**options, **kwargs})
    return LTETrainer(model=m, args=args, train_dataset=text(n, 1), eval_dataset=text(64, 2), lte=lte)


def gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, accumulate: int) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step over the same 8 sequences of unequal label counts."""
    m = model()
    begin_stage(m, "soft")
    t = trainer(
        m,
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        max_grad_norm=0.0,
        n=8,
    )
    for i, row in enumerate(t.train_dataset):
        row["labels"][: 2 * i] = -100
    kept: dict[str, torch.Tensor] = {}
    step = torch.optim.AdamW.step

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.update({n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    t.train()
    return kept


def test_gradient_accumulation_gives_the_big_batch_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(tmp_path, monkeypatch, batch=8, accumulate=1)
    for batch, accumulate in ((4, 2), (2, 4)):
        parts = gradients(tmp_path, monkeypatch, batch, accumulate)
        assert parts.keys() == whole.keys()
        assert any("router" in n for n in whole)
        for n, g in whole.items():
            assert (parts[n] - g).abs().max() <= 1e-5 * g.abs().max(), n


def test_the_losses_are_the_papers() -> None:
    logits = torch.tensor([[-2.0, 0.01, 3.0]])
    efficiency, separability = per_token_losses(logits, 0.5)
    g = torch.sigmoid(logits)
    assert torch.allclose(efficiency, g.square().mean(-1))
    distance = torch.tensor([abs(float(v) - 0.5) for v in g[0]])
    expected = (1 / distance.clamp_min(SEPARABILITY_CLAMP).square()).mean()
    assert torch.allclose(separability, expected)
    assert torch.isfinite(per_token_losses(torch.zeros(2, 3), 0.5)[1]).all()


def test_label_mask_marks_the_positions_that_predict_a_label() -> None:
    labels = torch.tensor([[-100, -100, 7, 8, -100]])
    assert label_mask(labels).tolist() == [[False, True, True, False, False]]
    assert label_mask(labels, shifted=False).tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize(
    ("target", "budget"),
    [
        *((t, "layer") for t in (0.3, 0.7, 0.95)),
        *((t, "model") for t in (0.5, 0.9)),
        *(pytest.param(t, "layer", marks=pytest.mark.slow) for t in (0.5, 0.8, 0.9)),
    ],
)
def test_both_stages_end_at_the_target_without_collapse(tmp_path: Path, target: float, budget: Any) -> None:
    """Sparsity within a point on text that neither training nor settling saw; a trained model keeps its quality."""
    m = trained(target)
    before = [r.weight.clone() for r in routers_of(m)]
    new_text = [copied_text(256, 31)]
    ends = []

    class Records(LTETrainer):
        def finish_stage(self, *args: Any) -> Any:
            out = super().finish_stage(*args)
            shares = ltepass.measure_sparsity(m, new_text)
            ends.append(([r.weight.clone() for r in routers_of(m)], sum(shares.values()) / len(shares)))
            return out

    t = fit(m, tmp_path, LTESettings(soft_steps=40, hard_steps=30, budget=budget), trainer=Records)
    (soft_routers, soft), (hard_routers, hard) = ends
    assert all(not torch.equal(a, b) for a, b in zip(before, soft_routers, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(soft_routers, hard_routers, strict=True))
    assert soft == pytest.approx(target, abs=0.01)
    assert hard == pytest.approx(target, abs=0.01)
    nothing = perplexity_without_ffns()
    dense = perplexity_of(trained(), "dense")
    kept = 1 - math.log(perplexity_of(m) / dense) / math.log(nothing / dense)
    assert kept > (0.9 if target <= 0.7 else 0.7 if target <= 0.9 else 0.4), kept
    rows = t.state.log_history
    assert any("lte_perplexity" in r and "lte_hard_sparsity" in r for r in rows)
    assert any("lte_hard_stage_held_out_perplexity" in r for r in rows)


def perplexity_without_ffns() -> float:
    m = trained()
    with torch.no_grad():
        for layer in m.model.layers:
            layer.mlp.down_proj.weight.zero_()
    return perplexity_of(m, "dense")


def test_the_soft_stage_logs_what_the_controller_saw(tmp_path: Path) -> None:
    t = fit(trained(), tmp_path, LTESettings(soft_steps=10, hard_steps=0, settle=False))
    names = "eta hard_sparsity soft_sparsity perplexity efficiency separability task_loss".split()
    rows = [r for r in t.state.log_history if "loss" in r]
    assert all(f"lte_{name}" in rows[-1] for name in names)
    assert rows[-1]["lte_perplexity"] == pytest.approx(math.exp(rows[-1]["lte_task_loss"]))
    assert 0 < rows[-1]["lte_soft_sparsity"] < 1


def test_the_hard_stage_logs_nothing_of_the_soft_one(tmp_path: Path) -> None:
    t = fit(trained(), tmp_path, LTESettings(soft_steps=10, hard_steps=10, settle=False))
    hard = [r for r in t.state.log_history if "loss" in r][-1]
    assert not {"lte_separability", "lte_efficiency", "lte_soft_sparsity", "lte_eta"} & set(hard)
    assert "lte_perplexity" in hard


def test_held_thresholds_follow_the_target_in_the_hard_stage(tmp_path: Path) -> None:
    """Training moves the FFNs' inputs away from what the thresholds were set on: held, they follow."""
    missed = {}
    for hold in (False, True):
        m = trained(0.5)
        for r in routers_of(m):
            r.threshold += 0.5  # as if the inputs had moved
        fit(m, tmp_path / str(hold), LTESettings(soft_steps=0, hard_steps=25, settle=False, hold=hold))
        shares = ltepass.measure_sparsity(m, [copied_text(64, 31)])
        missed[hold] = abs(sum(shares.values()) / len(shares) - 0.5)
    assert missed[True] < 0.03 < missed[False], missed


def test_the_controller_moves_sparsity_towards_the_target_by_itself(tmp_path: Path) -> None:
    """Without settling: eta pushes sparsity up; where there is too much of it already, eta can only let go."""
    reached, etas = [], []
    for target in (0.35, 0.8):
        m = model(0.5)
        t = trainer(m, tmp_path, LTESettings(soft_steps=80, hard_steps=0, settle=False, target_sparsity=target))
        t.fit()
        rows = [r for r in t.state.log_history if "lte_hard_sparsity" in r]
        reached.append(rows[-1]["lte_hard_sparsity"])
        etas.append([r["lte_eta"] for r in rows])
    # the last eta says which way sparsity was pushed last: after 80 steps, with an overshoot behind them, either way
    start = LTESettings().eta
    assert 0 < etas[0][-1] < start < max(etas[1]), etas
    assert reached[0] + 0.2 < reached[1], reached


def test_controller_raises_eta_while_sparsity_lags_and_lowers_it_beyond() -> None:
    c = SparsityController(target=0.6, eta=1.0)
    c.update(0.2, 0.0)
    assert c.update(0.2, 0.9) > 1.0
    high = SparsityController(target=0.2, eta=1.0)
    high.update(0.2, 0.0)
    for _ in range(5):
        high.update(0.9, 0.9)
    assert high.eta < 1.0
    assert SparsityController.from_state(high.state_dict()) == high


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    m = model()
    begin_stage(m, "soft")
    new, old = "activation_checkpointing", "gradient_checkpointing"
    name = new if hasattr(TrainingArguments, new) else old
    switched_on: dict[str, Any] = {name: True}
    reentrant: dict[str, Any] = {f"{name}_kwargs": {"use_reentrant": True}}
    with pytest.raises(TrainingError, match=f"{name}_kwargs has use_reentrant"):
        trainer(m, tmp_path, **reentrant, **switched_on).train()
    late = trainer(m, tmp_path, **reentrant)
    setattr(late.args, name, True)  # transformers mirrors one name in the other only as the arguments are made
    with pytest.raises(TrainingError, match=f"{name}_kwargs has use_reentrant"):
        late.train()
    # behind the trainer's back it is seen at the first step
    t = trainer(m, tmp_path, max_steps=1)
    getattr(m, f"{name}_enable")({"use_reentrant": True})
    m.enable_input_require_grads()
    with pytest.raises(TrainingError, match="left no auxiliary loss"):
        t.train()


def test_a_lowered_model_is_refused(tmp_path: Path) -> None:
    m = model()
    ltepass.set_mode(m, "hard")
    ltepass.lower(m)
    with pytest.raises(LoweredError, match="unlower"):
        trainer(m, tmp_path).fit()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path: Path) -> None:
    m = model()
    t = trainer(m, tmp_path, LTESettings(soft_steps=20))
    good: list[dict[str, torch.Tensor]] = []
    original = type(m).forward
    calls = 0

    @functools.wraps(original)  # the Trainer reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            good.append({k: v.clone() for k, v in m.state_dict().items()})
        out = original(self, *args, **kwargs)
        if calls == 4:
            out.loss = out.loss * float("nan")
        return out

    m.forward = MethodType(forward, m)
    with pytest.raises(TrainingError, match="step 3"):
        t.fit()
    for k, v in m.state_dict().items():
        assert torch.allclose(v, good[0][k], rtol=0, atol=0, equal_nan=True)
    assert (tmp_path / "soft" / "last-good" / "model.safetensors").exists()


def test_resuming_ends_with_bitwise_the_same_weights(tmp_path: Path) -> None:
    whole = model()
    begin_stage(whole, "soft")
    trainer(whole, tmp_path / "a", max_steps=12).train()

    first = model()
    begin_stage(first, "soft")
    t = trainer(first, tmp_path / "b", max_steps=12, save_strategy="steps", save_steps=5)
    stop = t.training_step

    def killed(*args: Any, **kwargs: Any) -> Any:
        if t.state.global_step == 7:
            raise KeyboardInterrupt
        return stop(*args, **kwargs)

    t.training_step = killed
    with pytest.raises(KeyboardInterrupt):
        t.train()
    again = model()
    begin_stage(again, "soft")
    resumed = trainer(again, tmp_path / "b", max_steps=12, save_strategy="steps", save_steps=5)
    resumed.train(resume_from_checkpoint=True)
    for (k, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), k
