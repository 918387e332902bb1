"""Adapters of the user's own under LTETrainer: trained where asked for, merged never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.errors import ConfigError
from ltepass.routed.routed import router_of, routers_of
from ltepass.training.settings import LTESettings
from ltepass.training.stages import stage_options
from tests.training.learning_cases import copied_text, fit, trained
from tests.typed import present

BOTH = LTESettings(soft_steps=2, hard_steps=2)
NOT_SAVED = pytest.mark.filterwarnings("ignore:the routers learn inside the base model")


def adapters(**config: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **config})


def image(model: Any) -> tuple[dict[str, Any], dict[str, bool], dict[str, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    kinds = {name: type(m) for name, m in model.named_modules()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    return kinds, flags, {name: p.detach().clone() for name, p in parameters.items()}


def moved(before: dict[str, torch.Tensor], model: Any) -> set[str]:
    now = dict(model.named_parameters())
    assert before.keys() == now.keys()
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(copied_text(3, 9)).logits
    return out


@NOT_SAVED
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_the_users_adapter_and_the_routers_learn_and_the_base_stays(tmp_path: Path, way: str) -> None:
    model = base = trained()
    if way == "add_adapter":
        base.add_adapter(adapters())
    else:
        model = get_peft_model(base, adapters())
    kinds, flags, before = image(model)
    assert fit(model, tmp_path, BOTH).lte_model is base
    now_kinds, now_flags, _ = image(model)
    assert (now_kinds, now_flags) == (kinds, flags)
    learned = moved(before, model)
    assert {name for name in learned if "lora_" in name} == {name for name in before if "lora_" in name}
    assert {name for name in learned if "lora_" not in name} == {name for name in before if ".router." in name}
    if way == "add_adapter":
        assert base.active_adapters() == ["default"]
    ltepass.report(model)


@NOT_SAVED
@pytest.mark.parametrize("saved", [None, ["router"], ["router", "down_proj"]])
def test_our_lora_goes_below_the_users_and_leaves_it_alone(tmp_path: Path, saved: Any) -> None:
    base = trained()
    model = get_peft_model(base, adapters(modules_to_save=saved))
    kinds, flags, before = image(model)
    fit(model, tmp_path, LTESettings(soft_steps=0, hard_steps=3, trainable="lora"))
    now_kinds, now_flags, _ = image(model)
    assert (now_kinds, now_flags) == (kinds, flags)
    ours = {name for name in before if "mlp" in name and not any(s in name for s in ("lora_", "router", "original"))}
    assert moved(before, model) == ours
    assert "ltepass" not in model.peft_config


def test_merging_our_lora_changes_no_output() -> None:
    base = trained()
    model = get_peft_model(base, adapters())
    with stage_options(base, LTESettings(trainable="lora"), "hard"):
        with torch.no_grad():
            for name, p in base.named_parameters():
                if "lora_B.ltepass" in name:
                    p.normal_(std=0.1)
        before = logits(model)
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.parametrize("sort", ["dora", "ia3"])
def test_our_lora_below_an_adapter_that_does_more_than_add_is_refused(sort: str) -> None:
    from peft import IA3Config

    names = ["up_proj", "down_proj"]
    config = adapters(use_dora=True) if sort == "dora" else IA3Config(target_modules=names, feedforward_modules=names)
    base = trained()
    model = get_peft_model(base, config)
    kinds, flags, _ = image(model)
    with pytest.raises(ConfigError, match="more than add"), stage_options(base, LTESettings(trainable="lora"), "soft"):
        pass
    assert image(model)[:2] == (kinds, flags)


def test_routers_in_modules_to_save_train_save_and_load(tmp_path: Path) -> None:
    base = trained()
    ltepass.set_hidden_sparsity(base, 0.2, [copied_text(4, 3)])
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, adapters(modules_to_save=["router"]))
    _, _, before = image(model)
    fit(model, tmp_path, BOTH)
    learned = moved(before, model)
    assert {n for n in learned if "router" in n} == {n for n in before if "router.modules_to_save" in n}
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert ltepass.measure_sparsity(again, [copied_text(8, 4)]) == ltepass.measure_sparsity(model, [copied_text(8, 4)])
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert torch.allclose(logits(ltepass.lower(merged)), expected, atol=1e-4)


def test_a_cut_that_the_base_model_does_not_have_is_not_loaded_with_an_adapter() -> None:
    model = get_peft_model(trained(), adapters(modules_to_save=["router"]))
    model.add_adapter("second", adapters(modules_to_save=["router"]))
    with pytest.warns(UserWarning, match="set_hidden_sparsity before get_peft_model"):
        ltepass.set_hidden_sparsity(model, 0.2, [copied_text(4, 3)])
    model.set_adapter("second")
    ltepass.set_hidden_sparsity(model, 0.3, [copied_text(4, 3)])
    assert all(float(present(router_of(model.get_base_model(), s).cut)) > 0 for s in ltepass.report(model).sites)


def test_routers_that_an_adapter_will_not_hold_give_a_warning(tmp_path: Path) -> None:
    model = get_peft_model(trained(), adapters())
    with pytest.warns(UserWarning, match="modules_to_save"):
        fit(model, tmp_path, LTESettings(soft_steps=0, hard_steps=0))


@NOT_SAVED
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_checkpoint_beside_an_adapter_holds_what_else_learned(tmp_path: Path, trainable: Any) -> None:
    """A finished stage is read from its folder: the same weights as those that were trained."""
    settings = LTESettings(soft_steps=2, hard_steps=0, trainable=trainable)
    ends = []
    for resume in (False, True):
        base = trained()
        torch.manual_seed(0)
        model = get_peft_model(base, adapters())
        _, _, before = image(model)
        fit(model, tmp_path, settings, resume=resume, save_strategy="steps", save_steps=1)
        assert any(".router." in name for name in moved(before, model))
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    assert any(routers_of(model))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(61)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_trl_with_a_peft_config(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    sft = type("SFT", (ltepass.LTETrainerMixin, trl.SFTTrainer), {})
    datasets = pytest.importorskip("datasets")
    base = trained()
    rows = datasets.Dataset.from_dict({"input_ids": copied_text(16, 11).tolist()})
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, bf16=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    config = adapters(modules_to_save=["router"])
    trainer = sft(model=base, args=args, train_dataset=rows, peft_config=config, processing_class=tokenizer(), lte=BOTH)
    assert trainer.lte_model is base
    kinds, flags, before = image(trainer.model)
    trainer.fit()
    assert image(trainer.model)[:2] == (kinds, flags)
    learned = moved(before, trainer.model)
    assert {n for n in learned if "lora_" in n or "modules_to_save" in n} == learned
    assert any("router" in n for n in learned)
