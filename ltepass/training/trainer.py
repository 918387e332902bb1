"""The paper's two stages on transformers' Trainer. The mixin goes before any Trainer class: TRL's work as well."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ltepass.errors import TrainingError
from ltepass.sites import require_state, router_of
from ltepass.training.controller import SparsityController
from ltepass.training.stages import (
    Stage,
    begin_stage,
    clear_auxiliary,
    label_mask,
    settle,
    take_auxiliary,
)

STATE_FILE = "lte_state.json"


@dataclass(frozen=True, kw_only=True)
class LTESettings:
    """Beside TrainingArguments, which each stage uses as they are.

    lam: separability coefficient (0.5 in the paper). eta: first efficiency coefficient, then steered to
    `target_sparsity` (None: the model's config) unless `steer` is off, as in the paper.
    soft_steps, hard_steps: optimizer steps of each stage; None takes the arguments' epochs or max_steps.
    settle: move thresholds at the end of each stage so that held-out sparsity meets the target.
    """

    lam: float = 0.5
    eta: float = 0.3
    steer: bool = True
    target_sparsity: float | None = None
    soft_steps: int | None = None
    hard_steps: int | None = None
    settle: bool = True


class LTETrainerMixin:
    """Adds the auxiliary loss, the controller and the stages to a Trainer.

    `fit()` runs both stages. `train()` alone runs the stage of the routers' mode.
    """

    args: Any  # what the Trainer behind the mixin brings
    accelerator: Any
    state: Any
    model: nn.Module
    eval_dataset: Any
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    add_callback: Any
    save_model: Any
    get_train_dataloader: Any
    get_eval_dataloader: Any
    _prepare_inputs: Any

    def __init__(self, *args: Any, lte: LTESettings | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lte = lte or LTESettings()
        self.lte_model: nn.Module = _root(self.model)
        config = require_state(self.lte_model, "LTETrainer").config
        target = self.lte.target_sparsity
        self.target_sparsity: float = config["target_sparsity"] if target is None else target
        self.controller = SparsityController(target=self.target_sparsity, eta=self.lte.eta)
        self._seen: dict[str, float] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.add_callback(_Guard(self))

    @property
    def stage(self) -> Stage:
        sites = require_state(self.lte_model, "LTETrainer").sites
        return "soft" if router_of(self.lte_model, sites[0]).mode == "soft" else "hard"

    def fit(self, resume_from_checkpoint: bool | str | None = None) -> None:
        """Soft stage, then hard stage, each an own `train()` with an own optimizer and folder (soft/, hard/)."""
        base, steps = self.args.output_dir, self.args.max_steps  # type: ignore[has-type]
        stages: tuple[tuple[Stage, int | None], ...] = (("soft", self.lte.soft_steps), ("hard", self.lte.hard_steps))
        try:
            for stage, stage_steps in stages:
                if stage_steps == 0:
                    continue
                begin_stage(self.lte_model, stage)
                self.args.output_dir = str(Path(base) / stage)
                self.args.max_steps = steps if stage_steps is None else stage_steps
                self.optimizer, self.lr_scheduler = None, None
                self.train(resume_from_checkpoint=resume_from_checkpoint)
                self.finish_stage()
        finally:
            self.args.output_dir, self.args.max_steps = base, steps

    def finish_stage(self, batches: Iterable[Any] | None = None) -> dict[str, float]:
        """Settle thresholds on `batches` (None: up to 8 of the evaluation set, else of the training set)."""
        if not self.lte.settle:
            return {}
        if batches is None:
            has_eval = self.eval_dataset is not None
            loader = self.get_eval_dataloader() if has_eval else self.get_train_dataloader()
            batches = [self._prepare_inputs(b) for b, _ in zip(loader, range(8), strict=False)]
        return settle(self.lte_model, batches, self.target_sparsity)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        begin_stage(self.lte_model, self.stage)  # refuses a lowered model before anything is built
        _refuse_reentrant(self.args)
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        labels = inputs.get("labels")
        steps_soft = self.stage == "soft" and model.training
        if steps_soft:
            clear_auxiliary(self.lte_model)
        out = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        loss, outputs = out if return_outputs else (out, None)
        if steps_soft and torch.is_grad_enabled():
            loss = loss + self._auxiliary_loss(labels, num_items_in_batch)
        if model.training and not torch.isfinite(loss.detach()).all():
            self._stop(f"the loss is {float(loss.detach().sum())}")
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_loss(self, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Sum over label tokens / the number of items that divides the task loss: exact under accumulation."""
        mask = None if labels is None else label_mask(labels, shifted=getattr(self, "_loss_shifts_labels", True))
        aux = take_auxiliary(self.lte_model, mask)
        self._pending.append((aux.sparsity, aux.tokens))
        share = self.controller.eta * aux.efficiency + self.lte.lam * aux.separability
        tokens = aux.tokens.clamp_min(1)
        self._seen.update(
            efficiency=float(aux.efficiency.detach() / tokens), separability=float(aux.separability.detach() / tokens)
        )
        scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not scaled or num_items_in_batch is None:
            return share / tokens
        loss = share / num_items_in_batch
        if self.args.average_tokens_across_devices:
            tp_size = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            loss = loss * (self.accelerator.num_processes // tp_size)
        return loss

    def steer(self, progress: float) -> None:
        """After an optimizer step: the controller sees the hard sparsity of the step's tokens."""
        if not self._pending:
            return
        inactive, tokens = (torch.stack(part).sum() for part in zip(*self._pending, strict=True))
        sparsity = float(inactive / tokens.clamp_min(1))
        self._pending.clear()
        if self.lte.steer:
            self.controller.update(sparsity, progress)
        self._seen.update(hard_sparsity=sparsity, eta=self.controller.eta)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds eta, sparsity and both losses to every training log, so that all reporters get them."""
        if "loss" in logs:
            logs = {**logs, **{f"lte_{k}": v for k, v in self._seen.items()}}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            state = {"stage": self.stage, "controller": self.controller.state_dict()}
            (folder / STATE_FILE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        file = Path(resume_from_checkpoint) / STATE_FILE
        if file.is_file():
            self.controller = SparsityController.from_state(json.loads(file.read_text())["controller"])

    def _stop(self, seen: str) -> None:
        """Training has diverged: the weights are those of the last good step; keep them on disk and stop."""
        folder = Path(self.args.output_dir) / "last-good"
        self.save_model(str(folder))
        raise TrainingError(
            f"{seen} at step {self.state.global_step}; expected a finite number; the weights of the last good step are "
            f"in {folder}; lower the learning rate or look at the batch"
        )


class LTETrainer(LTETrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the LTE stages."""


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Looks at gradients before they are applied, and steers after."""

    def __init__(self, trainer: LTETrainerMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in self.trainer.lte_model.parameters() if p.grad is not None]
        norms = torch.stack([g.detach().float().norm() for g in grads]) if grads else torch.zeros(1)
        if not torch.isfinite(norms).all():
            self.trainer._stop("a gradient is not finite")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.steer((state.global_step + 1) / max(1, state.max_steps))


def _root(model: nn.Module) -> nn.Module:
    """The transformed model inside whatever wraps it (PEFT)."""
    return next((m for m in model.modules() if hasattr(m, "_lte")), model)


def _refuse_reentrant(args: Any) -> None:
    kwargs = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    if args.gradient_checkpointing and kwargs.get("use_reentrant"):
        raise TrainingError(
            "gradient_checkpointing_kwargs has use_reentrant=True, which silently drops the auxiliary gradient; "
            "expected non-reentrant checkpointing; pass {'use_reentrant': False}"
        )
