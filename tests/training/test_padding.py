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
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
)

import ltepass
from ltepass.calibration.sensitivity import loss_sensitivity
from ltepass.calibration.warm_start import warm_start
from ltepass.errors import TrainingError
from ltepass.routed.padding import hooks_of, telling_tokens
from ltepass.routed.sites import router_of, routers_of
from ltepass.routed.token_rows import Forward, token_mask
from ltepass.routed.watching import record_logits, run_batches
from ltepass.training.auxiliary_loss import clear_auxiliary, inactive_shares, take_auxiliary
from ltepass.training.labels import label_mask
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage, hold, settle
from ltepass.training.trainer import LTETrainer, LTETrainerMixin
from tests.training.padded import FAMILIES, PAD, dense, padded, same, sequences, started, transformed, whole
from tests.typed import lte_state, present, routed

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

    monkeypatch.setattr("ltepass.training.training_step.take_auxiliary", spy)
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


def test_labels_say_nothing_of_what_an_encoder_reads() -> None:
    """As wide as its inputs: by hand from what the routers kept."""
    model = started("t5")
    begin_stage(model, "soft")
    ids, labels = torch.randint(1, 61, (2, 6)), torch.full((2, 6), -100)
    labels[:, :2] = 5
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    kept = [present(router_of(model, site).recorder.calls[0].losses)[0].clone() for site in model._lte.sites]
    aux = take_auxiliary(model, label_mask(labels, shifted=False))
    means = [
        losses.mean() if site.name.startswith("encoder") else losses[:, :2].mean()
        for site, losses in zip(model._lte.sites, kept, strict=True)
    ]
    assert int(aux.tokens) == 4
    torch.testing.assert_close(aux.efficiency, 4 * torch.stack(means).mean())


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_an_encoder_decoder_learns_from_its_tokens(
    distill: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its encoder's tokens by their mask, its decoder's by labels, which are not shifted; with a teacher too."""
    counted: list[float] = []
    take = take_auxiliary

    def spy(model: nn.Module, mask: Tensor | None) -> Any:
        sites = zip(lte_state(model).sites, routers_of(model), strict=True)
        counted.extend(float(router.recorder.calls[0].forward.masks[0].sum()) for _, router in sites)
        aux = take(model, mask)
        counted.append(float(aux.tokens))
        return aux

    monkeypatch.setattr("ltepass.training.training_step.take_auxiliary", spy)
    rows = sequences([5, 9, 2, 8])
    batch = padded("t5", rows, extra=6)
    batch["attention_mask"][:, 0] = 0  # as if sequences began later: the encoder's are four fewer
    examples = [{name: value[i] for name, value in batch.items()} for i in range(len(rows))]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    lte = LTESettings(distill=distill, hard_steps=0)
    LTETrainer(model=started("t5"), args=args, train_dataset=examples, lte=lte).fit()
    assert counted == [20.0, 20.0, 24.0, 24.0, 24.0]


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


class Inside(nn.Module):
    """Says that its language model is its encoder, and a part of that its decoder, as BLIP-2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model: PreTrainedModel = dense("opt")

    def get_encoder(self) -> PreTrainedModel:
        return self.language_model

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model.model.decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor | None = None) -> Any:
        return self.language_model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_decoder_inside_what_is_called_an_encoder_predicts_labels() -> None:
    batch, _ = one_batch("opt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 0] = -100
    model = ltepass.transform(Inside(), batch, ltepass.LTEConfig(group_size=4))
    begin_stage(model, "soft")
    model(**batch)
    assert int(take_auxiliary(model, label_mask(labels, shifted=False)).tokens) == sum(n - 1 for n in LENGTHS)


def other_families() -> dict[str, tuple[Any, list[int]]]:
    """Model, and the tokens that its sites see of (encoder) 19 and (decoder) 13 in batches of 3."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    bert = {**sizes, "intermediate_size": 48}
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDES.items()}
    pair = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**bert)),
        decoder=BertLMHeadModel(BertConfig(**bert, is_decoder=True, add_cross_attention=True)),
    )
    pair.config.decoder_start_token_id = pair.config.pad_token_id = 0
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**bert, "max_position_embeddings": 12, "eos_token_id": 60, "bos_token_id": 0, "pad_token_id": 0}
    clip = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 12, "patch_size": 4}, projection_dim=8)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return {
        "bart": (BartForConditionalGeneration(BartConfig(vocab_size=61, d_model=24, **sides)), [19, 13]),
        "bert to bert": (pair, [19, 13]),
        "bert": (BertForMaskedLM(BertConfig(**bert)), [19]),
        "modernbert": (ModernBertForMaskedLM(ModernBertConfig(**bert, **special)), [19]),  # takes padding out inside
        "xlnet": (XLNetLMHeadModel(XLNetConfig(vocab_size=61, d_model=24, n_layer=1, n_head=2, d_inner=48)), [19]),
        "clip": (CLIPModel(clip), [30, 19]),  # as many patches as tokens
    }


SIDES = {"ffn_dim": 48, "layers": 1, "attention_heads": 2}


@pytest.mark.parametrize("name", ["bart", "bert to bert", "bert", "modernbert", "xlnet", "clip"])
def test_each_site_sees_its_own_tokens(name: str) -> None:
    model, expected = other_families()[name]
    rows = sequences([3, 10, 6])
    batch = padded("t5", rows)
    batch["labels"] = torch.full((3, 8), -100)
    for i, n in enumerate((2, 7, 4)):
        batch["labels"][i, :n] = 5
    example = {**batch, "labels": batch["labels"].clamp_min(0)}
    if name == "clip":
        batch = {k: v for k, v in batch.items() if k != "labels"} | {"pixel_values": torch.randn(3, 3, 12, 12)}
        example = batch
    given = example if name in ("bert to bert", "clip") else None
    ltepass.transform(model.eval(), given, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    with warnings.catch_warnings(), record_logits(routed(model)) as seen:
        warnings.filterwarnings("error", message=".*which of them are padding")
        run_batches(model, [batch])
    assert [sum(map(len, logits)) for logits in seen.values()] == expected
