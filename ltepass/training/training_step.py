"""One training step: the losses of both stages, what steers after it, and the stop where something is not finite."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ltepass.errors import TrainingError
from ltepass.routed.batches import inputs_of
from ltepass.routed.padding import hooks_of
from ltepass.routed.routed import Routed, root_of, routers_of
from ltepass.routed.soft_losses import kl_from
from ltepass.training.auxiliary_loss import clear_auxiliary, inactive_shares, take_auxiliary
from ltepass.training.checkpoints import save_apart
from ltepass.training.controller import SparsityController
from ltepass.training.labels import label_mask, shifts_labels
from ltepass.training.lora import merge_lora
from ltepass.training.settings import LTESettings
from ltepass.training.stages import Stage, hold

if TYPE_CHECKING:
    from transformers import Trainer as Behind  # what a mixin reads of the Trainer behind it
    from transformers import TrainerState, TrainingArguments
    from transformers.utils import ModelOutput
else:
    Behind = object


class TrainingStepMixin(Behind):  # type: ignore[misc]  # mypy does not read transformers
    """Adds the stage's losses to those of a Trainer, and steers after each optimizer step. Paper section 4.3."""

    model: nn.Module

    def __init__(
        self, *args: object, lte: LTESettings | None = None, teacher: nn.Module | None = None, **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lte = lte or LTESettings()
        self._given_teacher = teacher
        self._adopt(self.model)
        self._seen: dict[str, Tensor | float] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._shares: list[Tensor] = []
        self._task: list[Tensor] = []
        self.add_callback(_Guard(self))

    def _adopt(self, model: nn.Module) -> None:
        """Take what belongs to one model from it."""
        self.model, self.lte_model = model, root_of(model, "LTETrainer")
        config, target = self._routed.config, self.lte.target_sparsity
        self.target_sparsity: float = config["target_sparsity"] if target is None else target
        self.controller = SparsityController(target=self.target_sparsity, eta=self.lte.eta)
        self.teacher = _dense_teacher(self.lte_model, self._given_teacher) if self.lte.distill else None

    @property
    def _routed(self) -> Routed:
        """Anew at each use: adapters come and go between steps."""
        return Routed.of(self.lte_model, "LTETrainer")

    @property
    def stage(self) -> Stage:
        return "soft" if self._routed.routers[0].mode == "soft" else "hard"

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        labels = inputs.get("labels")
        learns = model.training and torch.is_grad_enabled()
        if learns:
            clear_auxiliary(self._routed)
        wants_outputs = return_outputs or (learns and self.teacher is not None)
        out = super().compute_loss(
            model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        loss, outputs = out if wants_outputs else (out, None)
        if learns:
            self._task.append(loss.detach())
            loss = self._training_loss(loss, inputs, labels, outputs, num_items_in_batch)
            # Several processes stop together, when the gradient that they share is looked at.
            if self.args.world_size == 1 and not torch.isfinite(loss.detach()).all():
                self._stop(f"the loss is {float(loss.detach().sum())}")
        return (loss, outputs) if return_outputs else loss

    def _training_loss(
        self,
        loss: Tensor,
        inputs: dict[str, Tensor],
        labels: Tensor | None,
        outputs: ModelOutput,
        items: Tensor | int | None,
    ) -> Tensor:
        if labels is None or labels.dim() > 1:
            shifted = getattr(self, "_loss_shifts_labels", True) and shifts_labels(self.lte_model)
            mask = None if labels is None else label_mask(labels, shifted=shifted)
        else:  # one label a sequence: every token counts, and the items of the batch are no tokens
            mask = items = None
        if self.teacher is not None:
            kl = self._distillation(inputs, outputs, mask)
            loss = (1.0 - self.lte.distill) * loss + self._per_item(self.lte.distill * kl[0], kl[1], items)
        if self.stage == "soft":
            loss = loss + self._auxiliary_loss(mask, items)
        elif self.lte.hold:
            self._shares.append(inactive_shares(self._routed))
        return loss

    def _auxiliary_loss(self, mask: Tensor | None, items: Tensor | int | None) -> Tensor:
        aux = take_auxiliary(self.lte_model, mask)
        self._pending.append((aux.sparsity, aux.tokens))
        tokens = aux.tokens.clamp_min(1)
        self._seen.update(
            efficiency=aux.efficiency.detach() / tokens,
            separability=aux.separability.detach() / tokens,
            soft_sparsity=aux.soft_sparsity / tokens,
        )
        share = self.controller.eta * aux.efficiency + self.lte.lam * aux.separability + self.lte.union * aux.union
        return self._per_item(share, aux.tokens, items)

    def _distillation(
        self, inputs: dict[str, Tensor], outputs: ModelOutput, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(sum of KL over the positions whose prediction counts, their number)."""
        assert self.teacher is not None
        self.teacher.to(self.args.device)
        args, named = inputs_of(self.teacher, inputs)
        with torch.no_grad():
            taught = self.teacher(*args, **named).logits
        kl = kl_from(taught, outputs.logits)
        hooks = hooks_of(self.lte_model)
        real = None if hooks is None else hooks.output.tokens(kl.shape)
        weights = torch.ones_like(kl) if real is None else real.to(kl)
        weights = weights if mask is None else weights * mask.to(kl)
        return (kl * weights).sum(), weights.sum()

    def _per_item(self, total: Tensor, tokens: Tensor, items: Tensor | int | None) -> Tensor:
        """A sum over label tokens, divided by what divides the task loss: exact under accumulation."""
        scaled = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if not scaled or items is None:
            return total / tokens.clamp_min(1)
        loss = total / items
        if self.args.average_tokens_across_devices:
            tp_size = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            loss = loss * (self.accelerator.num_processes // tp_size)
        return loss

    def steer(self, progress: float) -> None:
        """After an optimizer step: the controller, or the thresholds, see the hard sparsity of the step's tokens."""
        if self._task:
            self._seen["task_loss"] = torch.stack(self._task).sum()
            if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
                self._seen["task_loss"] /= len(self._task)
            self._task.clear()
        if self._pending:
            sums = torch.stack([torch.stack(pair) for pair in self._pending]).sum(0)
            inactive, tokens = self.accelerator.reduce(sums, "sum")
            self._pending.clear()
            sparsity = float(inactive / tokens.clamp_min(1))
            if self.lte.steer:
                self.controller.update(sparsity, progress)
            self._seen.update(hard_sparsity=sparsity, eta=self.controller.eta)
        if self._shares:
            shares = self.accelerator.reduce(torch.stack(self._shares).mean(0), "mean")
            self._shares.clear()
            hold(self._routed, shares, self.target_sparsity, budget=self.lte.budget)
            self._seen["hard_sparsity"] = shares.mean()

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Adds eta, sparsities, losses and perplexity to every training log, so that all reporters get them."""
        if "loss" in logs:
            seen = {k: float(v) for k, v in self._seen.items()}
            if "task_loss" in seen:
                seen["perplexity"] = math.exp(min(seen["task_loss"], 80.0))
            logs = {**logs, **{f"lte_{k}": v for k, v in seen.items()}}
        super().log(logs, *args, **kwargs)

    def _stop(self, seen: str) -> None:
        """Training has diverged: the weights are those of the last good step; keep them on disk and stop."""
        folder = Path(self.args.output_dir) / "last-good"
        merge_lora(self.lte_model)
        self.save_model(str(folder))
        save_apart(self.model, self._routed, folder)
        raise TrainingError(
            f"{seen} at step {self.state.global_step}; expected a finite number; the weights of the last good step are "
            f"in {folder}; lower the learning rate or look at the batch"
        )


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Looks at gradients before they are applied, and steers after."""

    def __init__(self, trainer: TrainingStepMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        grads = [p.grad for p in self.trainer.lte_model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        if not torch.isfinite(norm):
            self.trainer._stop("a gradient is not finite")

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self.trainer.steer((state.global_step + 1) / max(1, state.max_steps))


def _dense_teacher(model: nn.Module, teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        teacher = copy.deepcopy(model)
        for router in routers_of(teacher):
            router.mode = "dense"
    return teacher.eval().requires_grad_(False)
