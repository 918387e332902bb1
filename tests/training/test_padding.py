"""Padding is seen by no loss, no threshold and no refit; which rows are padding is read from any form of mask."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainingArguments,
)

import ltepass
from ltepass.calibration.refit_down import warm_start
from ltepass.calibration.sensitivity import loss_sensitivity
from ltepass.errors import TrainingError
from ltepass.routed.batches import run_batches
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.samples import record_logits
from ltepass.routed.token_masks import Forward, hooks_of, telling_tokens, token_mask
from ltepass.training.auxiliary_loss import clear_auxiliary, inactive_shares, take_auxiliary
from ltepass.training.controller import hold
from ltepass.training.labels import label_mask
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage, settle
from ltepass.training.trainer import LTETrainerMixin
from tests.training.padded import FAMILIES, PAD, padded, same, sequences, started, transformed, whole
from tests.typed import routed

LENGTHS = [3, 9, 5, 12, 2, 4]


def one_batch(family: str, left: bool = False, extra: int = 30) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    rows = sequences(LENGTHS)
    return padded(family, rows, left=left, extra=extra), [whole(family, row) for row in rows]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_loss_of_a_padded_batch_is_its_sequences(family: str, left: bool) -> None:
    """Without labels, as a trainer has them that makes its own; its value and its gradient."""
    model = started(family)
    begin_stage(model, "soft")
    for router in routers_of(model):
        router.recorder.share_neighbours = True
    batch, alone = one_batch(family, left)
    found = []
    for batches in ([batch], alone):
        model.zero_grad()
        sums = []
        for one in batches:
            model(**one)
            aux = take_auxiliary(model, None)
            (aux.efficiency + 0.1 * aux.separability + aux.union).backward()
            sums.append(torch.stack([getattr(aux, name).detach() for name in aux.__dataclass_fields__]))
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if "router" in n and p.grad is not None}
        found.append({"sums": torch.stack(sums).sum(0), **gradients})
    same(found[0], found[1], 1e-3)
    assert found[0]["sums"][-1] == sum(LENGTHS)


def test_labels_and_padding_both_leave_tokens_out() -> None:
    """Labels that forget the padding, and prompts: what counts is a token whose prediction counts."""
    model = started("llama")
    begin_stage(model, "soft")
    batch, _ = one_batch("llama")
    labels = batch["input_ids"].clone()
    labels[:, :2] = -100
    model(**batch)
    aux = take_auxiliary(model, label_mask(labels))
    assert int(aux.tokens) == sum(n - 1 for n in LENGTHS)  # the first token predicts no label


def test_labels_that_fit_no_rows_are_refused_where_no_mask_tells() -> None:
    model = started("llama")
    begin_stage(model, "soft")
    model(input_ids=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TrainingError, match="saw 10 tokens and the labels have 8"):
        take_auxiliary(model, torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_cuts_and_costs_are_the_tokens_own(family: str) -> None:
    ends = []
    for batches in one_batch(family):
        batches = [batches] if isinstance(batches, dict) else batches
        model = started(family)
        shares = settle(model, batches, 0.4)
        ltepass.set_hidden_sparsity(model, 0.3, batches)
        ltepass.set_input_sparsity(model, 0.3, batches)
        routers = {site.name: router_of(model, site) for site in model._lte.sites}
        buffers = {f"{n}.{k}": b.clone() for n, r in routers.items() for k, b in r.named_buffers()}
        ends.append({**shares, **{n: b for n, b in buffers.items() if "permutation" not in n}})
    same(ends[0], ends[1], 5e-3)


def test_the_losss_sensitivity_is_the_tokens_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the likeliest label in place of a drawn one, which would differ from batch to batch."""
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    for family in FAMILIES:
        batch, alone = one_batch(family)
        model = started(family)
        together, apart = (loss_sensitivity(model, batches) for batches in ([batch], alone))
        for value, tolerance in (("log_cost", 1e-3), ("neurons", 1e-2)):
            of_batch, of_rows = ({name: getattr(s, value) for name, s in one.items()} for one in (together, apart))
            same(of_batch, of_rows, tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_is_the_tokens_own(family: str) -> None:
    """Of one sequence with much padding, and without."""
    (row,) = sequences([12])
    ends = []
    for batch in (padded(family, [row], extra=40), whole(family, row)):
        model = started(family)
        errors = warm_start(model, batch)
        downs = {s.name: s.down_rows.of(model, s.d_ff).detach().clone() for s in model._lte.sites}
        ends.append({**{f"{n} error": e for n, e in errors.items()}, **downs})
    same(ends[0], ends[1], 5e-3)


def test_whole_calibration_of_a_padded_batch_is_its_sequences() -> None:
    batch, alone = one_batch("llama")
    states = []
    for batches in ([batch], alone):
        model = transformed("llama", grouping="auto")
        ltepass.calibrate(model, batches, inputs="hard")
        states.append({k: v for k, v in model.state_dict().items() if "router" in k})
    same(states[0], states[1], 2e-2)


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).float(),
        torch.tensor([[1, 1, 2, 0], [3, 4, 0, 0]]),  # which document of a pack
        torch.tensor([[0.0, 0.0, 0.0, -1e9], [0.0, 0.0, -torch.inf, -torch.inf]]),
        torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]]),  # of a prefix too
    ],
)
@pytest.mark.parametrize("form", ["plain", "keys", "queries", "kinds"])
def test_tokens_are_read_from_any_form_of_mask(mask: Tensor, form: str) -> None:
    expected = [[True, True, True, False], [True, True, False, False]]
    if form == "keys":
        mask = mask[:, None, None]
    elif form == "queries":  # causal, as attention takes it
        causal = torch.ones(4, 4, dtype=torch.bool).tril()
        if mask.shape[1] != 4:
            causal = torch.cat([torch.ones(4, 2, dtype=torch.bool), causal], 1)
        blocked = torch.full((), torch.finfo(mask.dtype).min if mask.min() < 0 else 0.0).to(mask)
        mask = torch.where(causal, mask[:, None], blocked)[:, None]
    (found,) = token_mask({"full_attention": mask} if form == "kinds" else mask, 4)
    assert found.tolist() == expected


def test_masks_that_tell_nothing_leave_no_token_out() -> None:
    before = torch.ones(4, 4, dtype=torch.bool).tril(-1)[None, None]  # no token sees itself
    for mask in (torch.zeros(2, 4), torch.zeros(2, 1, 4, 4), torch.ones(2, 4), before.expand(2, 1, 4, 4)):
        (found,) = token_mask(mask, 4)
        assert bool(found.all())
    assert token_mask(None, 4) == token_mask(torch.ones(4), 4) == token_mask({}, 4) == token_mask("causal", 4) == ()
    (found,) = token_mask(torch.zeros(2, 4, dtype=torch.long), 4)
    assert not bool(found.any())  # a batch of padding


def test_rows_are_told_by_their_shape() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    forward = Forward((mask,))
    for shape, expected in (
        ((2, 4), mask),
        ((8,), mask.flatten()),
        ((1, 8), mask.reshape(1, 8)),
        ((2, 1, 4), mask[:, None]),
        ((4, 2), mask.T),
        ((5,), torch.ones(5, dtype=torch.bool)),  # the model took its padding out
    ):
        found = forward.tokens(shape)
        assert found is not None
        assert torch.equal(found, expected)
    assert forward.tokens((2, 3)) is None
    assert Forward((mask, ~mask)).tokens((2, 4)) is None
    assert Forward().tokens((2, 4)) is None


class Tower(nn.Module):
    """A model whose first FFN sees patches and whose second sees tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.embed = nn.Embedding(20, 8)

    def forward(self, input_ids: Tensor, patches: Tensor, attention_mask: Tensor | None = None) -> Any:
        seen = patches + self.patches(patches)
        x = self.embed(input_ids) + seen.mean(1, keepdim=True)
        return x + self.words(x)


def test_rows_that_no_mask_fits_all_count_with_one_warning() -> None:
    example = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "patches": torch.randn(2, 9, 8)}
    model = ltepass.transform(Tower().eval(), example, ltepass.LTEConfig(group_size=4))
    batch = {**example, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
    ltepass.set_mode(model, "hard")
    text = r"saw rows of shape \[2, 9\] and the mask of the batch is \[2, 4\]"
    with pytest.warns(UserWarning, match=text) as seen, record_logits(routed(model)) as logits:
        run_batches(model, [batch, batch])
    assert len(seen) == 1
    assert {sum(map(len, rows)) for rows in logits.values()} == {36, 10}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is padding: nothing to tell
        ltepass.measure_sparsity(model, [{**batch, "attention_mask": torch.ones(2, 4)}])


class OwnInputs(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Makes its own batch and labels inside, as DPO does: each sequence twice, padded further."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        pad = (0, 3)
        ids = nn.functional.pad(inputs["input_ids"].repeat(2, 1), pad, value=PAD)
        mask = nn.functional.pad(inputs["attention_mask"].repeat(2, 1), pad)
        out = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        return (out.loss, out) if return_outputs else out.loss


class Twice(OwnInputs):
    """Calls the model twice for one loss, once through its base model."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        first = super().compute_loss(model, inputs)
        hidden = model.model(**{k: v[:, :6] for k, v in inputs.items()}).last_hidden_state
        return first + 1e-3 * hidden.square().mean()


@pytest.mark.parametrize(("base", "tokens"), [(OwnInputs, 2 * 4 * 8), (Twice, 2 * 4 * 8 + 4 * 6)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_that_makes_its_own_inputs_counts_its_tokens(
    base: type[Trainer], tokens: int, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[float] = []
    take = take_auxiliary

    def spy(model: nn.Module, mask: Tensor | None) -> Any:
        aux = take(model, mask)
        counted.append(float(aux.tokens))
        return aux

    monkeypatch.setattr("ltepass.training.trainer.take_auxiliary", spy)
    trainer_class = type("LTE", (LTETrainerMixin, base), {})
    ids, real = torch.randint(1, 61, (8, 20)), torch.arange(20) < 8
    rows = [{"input_ids": row.where(real, PAD), "attention_mask": real.long()} for row in ids]
    new, old = "activation_checkpointing", "gradient_checkpointing"
    name = new if hasattr(TrainingArguments, new) else old
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no",
        **{name: checkpointing, f"{name}_kwargs": {"use_reentrant": False} if checkpointing else None},
    )  # fmt: skip
    model = started("llama")
    trainer = trainer_class(model=model, args=args, train_dataset=rows, lte=LTESettings(hard_steps=1))
    trainer.fit()
    assert counted == [tokens / 2] * 4  # two sequences a time
    assert hooks_of(model) is None
    assert all(router.recorder.rows is None and not router.recorder.calls for router in routers_of(model))


def test_held_thresholds_follow_the_tokens_alone() -> None:
    model = started("llama")
    begin_stage(model, "hard")
    for router in routers_of(model):
        router.recorder.count_inactive = True
    batch, alone = one_batch("llama")
    with telling_tokens(routed(model), keep=True):
        model(**batch)
        shares = inactive_shares(routed(model))
        for one in alone:
            model(**one)
        torch.testing.assert_close(shares, inactive_shares(routed(model)))
    measured = list(ltepass.measure_sparsity(model, [batch]).values())
    torch.testing.assert_close(shares, torch.tensor(measured), rtol=1e-4, atol=1e-4)
    hold(routed(model), shares, 0.5)


def test_nothing_is_kept_of_forwards_that_nobody_takes() -> None:
    """A loop of soft forwards with gradients holds what one does."""
    model = started("llama")
    ltepass.set_mode(model, "soft")
    for _ in range(3):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert {len(router.recorder.calls) for router in routers_of(model)} == {1}
    ltepass.set_mode(model, "dense")
    assert hooks_of(model) is None
    for router in routers_of(model):
        router.mode = "soft"  # behind our back: nobody counts
    for _ in range(3):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert {len(router.recorder.calls) for router in routers_of(model)} == {1}


def test_a_copy_of_a_model_in_training_counts_its_own_tokens() -> None:
    model = started("llama")
    begin_stage(model, "soft")
    batch, _ = one_batch("llama")
    model(**batch)
    clear_auxiliary(routed(model))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(**batch)
        assert int(take_auxiliary(copied, None).tokens) == sum(LENGTHS)
    assert not any(router.recorder.calls for router in routers_of(model))
