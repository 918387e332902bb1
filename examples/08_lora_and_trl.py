"""LoRA and TRL: SFTTrainer trains an adapter and the routers, then the adapter is merged and the model lowered."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # trl makes them at their first use

import ltepass


class SparseSFTTrainer(ltepass.LTETrainerMixin, SFTTrainer):
    """The mixin goes before any Trainer class."""


def words() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0", eos_token="w1")


def main() -> None:
    # TRL asks by names that transformers had before
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    ids = (torch.arange(64)[:, None] + torch.arange(24)) % 64  # sequences that count
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=8), calibration=[ids])

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10,
            use_cpu=True,
            bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SparseSFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            processing_class=words(),
            # routers are trained beside the adapter: modules_to_save keeps them with it
            peft_config=LoraConfig(r=4, target_modules=["up_proj", "gate_proj"], modules_to_save=["router"]),
            lte=ltepass.LTESettings(soft_steps=10, hard_steps=10),
        )
        trainer.fit()

    merged: Any = trainer.model.merge_and_unload()  # type: ignore[operator]  # only plain linears are lowered
    merged.eval()
    print(ltepass.report(merged, batches=[ids[:8]]))
    ltepass.lower(merged, scope="ffn")
    out = merged.generate(ids[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    print("continued:", out[0].tolist())


if __name__ == "__main__":
    main()
