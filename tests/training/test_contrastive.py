"""Contrastive terms: the loss against its formula written out, what pulls where, and a training that has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import ltepass
from ltepass.errors import ConfigError, TrainingError
from ltepass.training.contrastive import ContrastiveSettings, contrastive_loss, frozen, pooled
from ltepass.training.settings import LTESettings
from ltepass.training.trainer import LTETrainer
from tests.models.zoo import made_once
from tests.properties.trees import examples


def written_out(own: Tensor, others: list[Tensor], labels: Tensor, unsupervised: float, supervised: float) -> float:
    """The module's docstring, one example after the other."""
    total = 0.0
    for i, anchor in enumerate(own):
        candidates = [(j, z, False) for j, z in enumerate(own) if j != i]
        candidates += [(j, z, True) for other in others for j, z in enumerate(other)]
        cosines = [float(torch.cosine_similarity(anchor, z, dim=0)) / 0.1 for _, z, _ in candidates]
        below = math.log(sum(map(math.exp, cosines)))
        same = [below - s for s, (j, _, theirs) in zip(cosines, candidates, strict=True) if theirs and j == i]
        alike = [below - s for s, (j, _, _) in zip(cosines, candidates, strict=True) if labels[j] == labels[i]]
        total += unsupervised * sum(same) / len(same) + supervised * sum(alike) / len(alike)
    return total / len(own)


@examples(20)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 1000))
def test_the_loss_is_its_formula(batch: int, models: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own, *others = torch.randn(1 + models, batch, 4, generator=generator)
    labels = torch.randint(3, (batch,), generator=generator)
    found = contrastive_loss(own, others, labels, unsupervised=0.3, supervised=0.7)
    assert float(found) == pytest.approx(written_out(own, others, labels, 0.3, 0.7), rel=1e-4)


def test_a_step_goes_towards_the_example_elsewhere_and_towards_its_label() -> None:
    torch.manual_seed(0)
    own, other = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    for kinds, target in (
        ((1.0, 0.0), other),
        ((0.0, 1.0), other.unflatten(0, (2, 3)).mean(1).repeat_interleave(3, 0)),
    ):
        (gradient,) = torch.autograd.grad(
            contrastive_loss(own, [other], labels, unsupervised=kinds[0], supervised=kinds[1]), own
        )
        moved = (own - gradient).detach()
        closer = torch.cosine_similarity(moved, target) - torch.cosine_similarity(own.detach(), target)
        assert closer.mean() > 0


def test_a_representation_is_of_tokens_alone() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    mean = torch.stack([hidden[0, :2].mean(0), hidden[1, 1:].mean(0)])
    torch.testing.assert_close(pooled(hidden, {"attention_mask": mask}, "mean"), mean)
    first = torch.stack([hidden[0, 0], hidden[1, 1]])
    assert torch.equal(pooled(hidden, {"attention_mask": mask}, "first"), first)
    torch.testing.assert_close(pooled(hidden, {}, "mean"), hidden.mean(1))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"pretrained": -1.0}, "pretrained is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"pooling": "last"}, "pooling is 'last'"),
        ({"supervised": 0.0, "unsupervised": 0.0}, "unsupervised, supervised are all 0"),
        ({"pretrained": 0.0, "finetuned": 0.0, "snapshots": 0.0}, "are all 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ContrastiveSettings(**wrong)


def test_what_is_no_representation_or_no_setting_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"expected \[B, d\] of each"):
        contrastive_loss(torch.ones(2, 3), [torch.ones(2, 4)])
    with pytest.raises(TrainingError, match="one other at least"):
        contrastive_loss(torch.ones(2, 3), [])
    with pytest.raises(ConfigError, match=r"expected ltepass\.ContrastiveSettings"):
        LTESettings(contrastive=0.5)  # type: ignore[arg-type]


def test_a_masked_model_is_copied_after_a_forward_with_gradients() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4))
    ltepass.prune(linear, method="magnitude", sparsity=0.5)
    expected = linear(torch.ones(1, 4))
    twin = frozen(linear)
    assert torch.equal(twin(torch.ones(1, 4)), expected)
    assert not any(p.requires_grad for p in twin.parameters())


@made_once
def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=32, num_labels=2, pad_token_id=0))


def trainer(tmp_path: Path, contrastive: ContrastiveSettings | None, **given: Any) -> LTETrainer:
    model = classifier()
    ids = torch.randint(1, 31, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(6, dtype=torch.int64)
    rows = [{"input_ids": row, "attention_mask": mask, "labels": i % 2} for i, row in enumerate(ids)]
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=4), calibration=[{"input_ids": ids}])
    kept = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = TrainingArguments(**kept, per_device_train_batch_size=4, learning_rate=1e-2, seed=0)
    lte = LTESettings(soft_steps=1, hard_steps=1, distill=0.5, contrastive=contrastive)
    return LTETrainer(model, arguments, train_dataset=rows, lte=lte, **given)


def seen(trained: LTETrainer) -> list[float]:
    return [log["lte_contrastive"] for log in trained.state.log_history if "lte_contrastive" in log]


def test_a_training_adds_the_terms_and_looks_back_to_its_soft_stage(tmp_path: Path) -> None:
    t = trainer(tmp_path, ContrastiveSettings(), pretrained=classifier())
    before = {name: p.clone() for name, p in t.contrast.pretrained.named_parameters()}  # type: ignore[union-attr]
    t.fit()
    assert len(t.contrast.snapshots) == 1  # type: ignore[union-attr]
    assert ltepass.report(t.contrast.snapshots[0]).modes != {}  # type: ignore[union-attr]
    assert all(value > 0 for value in seen(t))
    for name, p in t.contrast.pretrained.named_parameters():  # type: ignore[union-attr]
        assert torch.equal(p, before[name])
        assert p.grad is None
    other = trainer(tmp_path, None)
    other.fit()
    assert not all(torch.equal(a, b) for a, b in zip(t.model.parameters(), other.model.parameters(), strict=True))


def test_snapshots_that_are_given_count(tmp_path: Path) -> None:
    alone = ContrastiveSettings(pretrained=0.0, finetuned=0.0, supervised=0.0)
    losses = []
    for earlier in ((), (classifier(),)):
        t = trainer(tmp_path, alone, snapshots=earlier)
        t.lte = LTESettings(soft_steps=1, hard_steps=0, contrastive=alone)
        t.fit()
        losses.append(seen(t))
    assert losses[0] == [0.0], "there is no earlier step yet"
    assert losses[1][0] > 0


def test_what_a_trainer_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no pre-trained model was given"):
        trainer(tmp_path, ContrastiveSettings())
    with pytest.raises(ConfigError, match="no contrastive terms that read them"):
        trainer(tmp_path, None, pretrained=classifier())
    t = trainer(tmp_path, ContrastiveSettings(pretrained=0.0))
    hidden, ids = torch.ones(2, 6, 16), torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(TrainingError, match=r"the batch has torch.int64 \[2, 6\]"):
        t.contrast.loss(hidden, {"input_ids": ids}, ids)  # type: ignore[union-attr]
