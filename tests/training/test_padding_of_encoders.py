"""Padded batches of encoder-decoders and of other families: each site sees its own tokens."""

from __future__ import annotations

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
    TrainingArguments,
    XLNetConfig,
    XLNetLMHeadModel,
)

import ltepass
from ltepass.routed.batches import run_batches
from ltepass.routed.routed import router_of, routers_of
from ltepass.routed.samples import record_logits
from ltepass.training.auxiliary_loss import take_auxiliary
from ltepass.training.labels import label_mask
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage
from ltepass.training.trainer import LTETrainer
from tests.training.padded import dense, padded, sequences, started
from tests.training.test_padding import LENGTHS, one_batch
from tests.typed import lte_state, present, routed


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

    monkeypatch.setattr("ltepass.training.trainer.take_auxiliary", spy)
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
