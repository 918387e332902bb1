"""Training on a budget's blocks, each once and in one order: dense, under a rule, and LTE."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

import ltepass
from examples.compare.rule_hooks import Ruled
from examples.compare.study import Budget, Data, Recipe, calibration_blocks
from ltepass.calibration.refit_down import warm_start
from ltepass.routed.routed import Routed
from ltepass.sparsity.thresholds import set_sparsity, update_table
from ltepass.training.settings import LTESettings
from ltepass.training.trainer import LTETrainerMixin


class InOrder:
    """A Trainer that takes the blocks as they come: every method sees the same tokens in the same order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class DenseTrainer(InOrder, Trainer):  # type: ignore[misc]
    ruled: Ruled | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        out = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        extra = self.ruled.extra_loss() if self.ruled is not None and model.training else None
        if extra is None:
            return out
        return (out[0] + extra, out[1]) if return_outputs else out + extra


class RoutedTrainer(InOrder, LTETrainerMixin, Trainer):  # type: ignore[misc]
    """LTE on the same loop."""


def arguments(budget: Budget, folder: Path, seed: int, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=budget.batch,
        learning_rate=budget.learning_rate,
        adam_beta2=0.95,
        weight_decay=0.0,
        warmup_steps=max(1, round(0.06 * steps)),
        lr_scheduler_type="linear",
        bf16=budget.dtype == "bfloat16",
        seed=seed,
        save_strategy="no",
        logging_steps=max(1, steps // 8),
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def examples(blocks: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": block, "labels": block} for block in blocks]


def freeze_embeddings(model: Any) -> None:
    """A tenth of a step's time, and rare tokens learn nothing from so little text. For every method alike."""
    model.get_input_embeddings().weight.requires_grad_(False)


def tune_dense(
    model: Any, data: Data, budget: Budget, folder: Path, seed: int, ruled: Ruled | None = None
) -> list[Any]:
    """Plain fine-tuning, under rules where there are any; returns the log. Raises ValueError where gradients overflow:
    clipping would turn them into zeros, and the row would show a model that never learned."""
    freeze_embeddings(model)
    args = arguments(budget, folder, seed, budget.steps)
    trainer = DenseTrainer(model=model, args=args, train_dataset=examples(data.train))
    trainer.ruled = ruled
    trainer.train()
    model.eval()
    log = list(trainer.state.log_history)
    norms = [row["grad_norm"] for row in log if "grad_norm" in row]
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"gradient norms were {norms}; expected finite ones; look at the rule's scale of scores")
    return log


def tune_lte(
    model: Any,
    data: Data,
    budget: Budget,
    folder: Path,
    seed: int,
    *,
    recipe: Recipe,
    cuts: Any = None,
    teacher: Any = None,
) -> tuple[Any, list[Any]]:
    """Train a calibrated model with this recipe to its target; returns (model in hard mode, log).

    cuts: `cuts.Cuts`, what active experts leave out from the first step on. teacher: as LTETrainer has it.
    """
    blocks = calibration_blocks(data, budget, recipe.start).to(model.device)
    if recipe.random_routers:
        forget_routers(model, blocks, seed)
    if recipe.warm:
        warm_start(model, blocks)
    freeze_embeddings(model)
    held_out = data.held_out.to(model.device)
    if cuts is not None:
        cuts.apply(model, torch.split(held_out, budget.batch))
    log = run_stages(model, examples(data.train), examples(held_out), budget, folder, seed, recipe, teacher)
    return model, log


def run_stages(
    model: Any,
    rows: list[Any],
    held_out: list[Any],
    budget: Budget,
    folder: Path,
    seed: int,
    recipe: Recipe,
    teacher: Any = None,
) -> list[Any]:
    """Both stages, each on its own share of the rows, so that none is seen twice; thresholds settle on `held_out`;
    returns the log."""
    budget = replace(budget, learning_rate=recipe.rate * budget.learning_rate)
    soft = round(recipe.soft_share * budget.steps)
    cut = soft * budget.batch
    log: list[Any] = []
    for stage, steps, part in (("soft", soft, rows[:cut]), ("hard", budget.steps - soft, rows[cut:])):
        if steps:
            soft_steps, hard_steps = (steps, 0) if stage == "soft" else (0, steps)
            lte = replace(LTESettings(**recipe.settings), soft_steps=soft_steps, hard_steps=hard_steps)
            args = arguments(budget, folder, seed, steps)
            sets: dict[str, Any] = {"train_dataset": part, "eval_dataset": held_out}
            trainer = RoutedTrainer(model=model, args=args, lte=lte, teacher=teacher, **sets)
            trainer.fit()
            log += trainer.state.log_history
    ltepass.set_mode(model, "hard")
    model.eval()
    return log


def forget_routers(model: nn.Module, blocks: Tensor, seed: int) -> None:
    """Random routers with thresholds at the target: what the calibrated start is compared with."""
    generator = torch.Generator().manual_seed(seed)
    routed = Routed.trained(model, "forget_routers")
    for router in routed.all_routers():
        permutation = router.permutation.clone()
        router.reset(generator)
        router.permutation.copy_(permutation)
    ltepass.set_mode(model, "hard")
    update_table(routed, [blocks])
    set_sparsity(model, routed.config["target_sparsity"])
