"""A small LLaMA whose FFNs have something to find: some neurons fire together, some matter more, all depend on x."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import ltepass
from ltepass.measure.quality import perplexity
from ltepass.routed.modes import mode_of
from ltepass.routed.routed import router_of
from ltepass.training.settings import LTESettings
from ltepass.training.trainer import LTETrainer
from tests.models.zoo import made_once
from tests.typed import routed

VOCAB = 61


def dense_model(*, d_ff: int = 60, layers: int = 2, seed: int = 0) -> Any:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(state)
    return model


def tokens(n: int, length: int = 21, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


@made_once
def transformed(target: float = 0.5, *, group_size: int = 4, **config: Any) -> Any:
    """Transformed and not calibrated."""
    settings = {"group_size": group_size, "target_sparsity": target, "grouping": "identity", **config}
    return ltepass.transform(dense_model(), config=ltepass.LTEConfig(**settings))


@made_once
def calibrated(target: float = 0.5, *, group_size: int = 4, n: int = 60, **config: Any) -> Any:
    settings = {"group_size": group_size, "target_sparsity": target, **config}
    return ltepass.transform(dense_model(), config=ltepass.LTEConfig(**settings), calibration=tokens(n).split(7))


def router_inputs(model: Any, batches: Sequence[Tensor], mode: Any) -> dict[str, Tensor]:
    """By site: what every token of the batches gives its router in this mode, [n_tokens, d_model]."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in model._lte.sites}
    for site in model._lte.sites:
        router_of(model, site).register_forward_pre_hook(
            lambda _, args, name=site.name: seen[name].append(args[0].flatten(0, -2))
        )
    with mode_of(routed(model), mode), torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.cat(rows) for name, rows in seen.items()}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), after[name].nan_to_num()), name


def copied_text(n: int, seed: int, length: int = 32) -> Tensor:
    """[n, length]: each token is a fixed permutation of the one before, one time in ten a random one."""
    g = torch.Generator().manual_seed(seed)
    follows = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(99))
    rows = torch.randint(0, VOCAB, (n, length), generator=g)
    for t in range(1, length):
        keep = torch.rand(n, generator=g) < 0.9
        rows[:, t] = torch.where(keep, follows[rows[:, t - 1]], rows[:, t])
    return rows


def small_llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@cache
def _trained_weights() -> dict[str, Tensor]:
    """A model too narrow to do without its FFNs, trained on copied_text in three seconds."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model, text = small_llama().train(), copied_text(2048, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (150 - step) / 50)
        rows = text[torch.randint(len(text), (16,), generator=torch.Generator().manual_seed(step))]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.random.set_rng_state(state)
    weights: dict[str, Tensor] = model.state_dict()
    return weights


@made_once
def trained(target: float = 0.5, **config: Any) -> Any:
    """Trained, transformed and calibrated; in dense mode."""
    state = torch.random.get_rng_state()
    model = small_llama().eval()
    torch.random.set_rng_state(state)
    model.load_state_dict(_trained_weights())
    settings = {"group_size": 4, "target_sparsity": target, **config}
    return ltepass.transform(model, config=ltepass.LTEConfig(**settings), calibration=copied_text(64, 5).split(16))


def perplexity_of(model: Any, mode: Any = "hard") -> float:
    """On text that was never trained on."""
    with mode_of(routed(model), mode):
        return perplexity(model, copied_text(16, 2))


def fit(
    model: Any,
    folder: Path,
    lte: LTESettings,
    *,
    labels: Tensor | None = None,
    trainer: Any = LTETrainer,
    resume: bool = False,
    **kwargs: Any,
) -> Any:
    """Both stages on new text; returns the trainer."""
    options = {
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 5,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    text = copied_text(512, 11)
    rows = [{"input_ids": a, "labels": b} for a, b in zip(text, text if labels is None else labels, strict=True)]
    held_out = [{"input_ids": a, "labels": a} for a in copied_text(128, 12)]
    args = TrainingArguments(output_dir=str(folder), **{**options, **kwargs})
    t = trainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out, lte=lte)
    t.fit(**({"resume_from_checkpoint": True} if resume else {}))
    model.eval()
    return t
