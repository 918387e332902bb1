"""The paper's two stages on transformers' Trainer. The mixin goes before any Trainer class: TRL's work as well.

One step: the task's loss and those of the stage, what steers after it, and the stop where something is not finite.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate.utils import broadcast, broadcast_object_list, gather_object, send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from ltepass.errors import ConfigError, TrainingError
from ltepass.routed.batches import Batch
from ltepass.routed.routed import Routed, require_whole, root_of
from ltepass.routed.token_masks import telling_tokens
from ltepass.saving.model_card import Measured, is_saved_routed, write_card
from ltepass.training.auxiliary_loss import clear_auxiliary, inactive_shares, take_auxiliary
from ltepass.training.checkpoints import (
    STATE_FILE,
    is_finished,
    last_complete,
    load_apart,
    mark_complete,
    save_apart,
    saved_apart,
)
from ltepass.training.contrastive import Contrast, last_hidden
from ltepass.training.controller import SparsityController, hold
from ltepass.training.distillation import dense_teacher, divergence
from ltepass.training.labels import label_mask, shifts_labels
from ltepass.training.lora import merge_lora
from ltepass.training.settings import LTESettings, refuse_reentrant
from ltepass.training.stages import Stage, held_out_perplexity, settle, stage_options

if TYPE_CHECKING:
    from transformers import Trainer as Behind  # what a mixin reads of the Trainer behind it
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer_utils import TrainOutput
    from transformers.utils import ModelOutput
else:
    Behind = object

HELD_OUT = 8  # batches that a stage is settled on

__all__ = ["LTESettings", "LTETrainer", "LTETrainerMixin"]


class LTETrainerMixin(Behind):  # type: ignore[misc]  # mypy does not read transformers
    """Adds the auxiliary loss, the controller and the stages to a Trainer. Paper section 4.3.

    `fit()` runs both stages. `train()` alone runs the stage of the routers' mode.

    Arguments:
        lte: settings of the stages; None takes `LTESettings()`. All others go to the Trainer behind the mixin.
        teacher: of `LTESettings.distill`, and the fine-tuned model of `contrastive`; None takes a copy of the model
            with every neuron active, as it is now.
        pretrained: of `LTESettings.contrastive`: the model before fine-tuning; it learns nothing from now on.
        snapshots: of the same: the model after earlier pruning steps. `fit` adds a copy at the soft stage's end.
    Raises: NotTransformedError, LoweredError, TrainingError, ConfigError.
    Example:
        >>> from transformers import TrainingArguments, Trainer
        >>> arguments = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        >>> rows = [{"input_ids": row, "labels": row} for row in ids]
        >>> class MyTrainer(ltepass.LTETrainerMixin, Trainer):
        ...     pass
        >>> MyTrainer(model, arguments, train_dataset=rows).target_sparsity
        0.5
    """

    model: nn.Module
    _keeps_model = False
    _next_stage: Stage | None = None  # of `fit`; else the routers' mode says it

    def __init__(
        self,
        *args: object,
        lte: LTESettings | None = None,
        teacher: nn.Module | None = None,
        pretrained: nn.Module | None = None,
        snapshots: Sequence[nn.Module] = (),
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lte = lte or LTESettings()
        self._given_teacher, self._pretrained, self._earlier = teacher, pretrained, snapshots
        if self.lte.contrastive is None and (pretrained is not None or snapshots):
            raise ConfigError(
                "pretrained or snapshots were given, and LTESettings has no contrastive terms that read them; pass "
                "LTESettings(contrastive=ltepass.ContrastiveSettings())"
            )
        self._adopt(self.model)
        self._seen: dict[str, Tensor | float] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._shares: list[Tensor] = []
        self._task: list[Tensor] = []
        self._measured: tuple[list[float], Measured] | None = None  # at these thresholds, when a stage ended
        self.add_callback(_Guard(self))
        if saved_apart(self.model, self._routed):
            warnings.warn(
                "the routers learn inside the base model, and an adapter's folder does not hold them; expected "
                "modules_to_save=['router'] in the adapter's config; add it, or save the base model as well",
                stacklevel=2,
            )

    def _adopt(self, model: nn.Module) -> None:
        """Take what belongs to one model from it."""
        self.model, self.lte_model = model, root_of(model, "LTETrainer")
        if not (getattr(self, "is_distributed_loading_by_transformers", False) or self.args.fsdp):
            name = type(self).__name__  # accelerate would wrap shards in DDP, which cannot hold them
            how = "DistributedConfig(fsdp_size=...)"
            if not hasattr(self, "is_distributed_loading_by_transformers"):
                how += f", which trains from transformers 5.19 on: {transformers.__version__} is installed"
            require_whole(model, f"{name}, unless from_pretrained sharded it ({how}),")
        config, target = self._routed.config, self.lte.target_sparsity
        self.target_sparsity: float = config["target_sparsity"] if target is None else target
        self.controller = SparsityController(target=self.target_sparsity, eta=self.lte.eta)
        taught = self.lte.distill or self.lte.contrastive
        self.teacher = dense_teacher(self.lte_model, self._given_teacher) if taught else None
        self.contrast = self._contrast(self.teacher)

    def _contrast(self, finetuned: nn.Module | None) -> Contrast | None:
        if self.lte.contrastive is None or finetuned is None:
            return None
        contrast = Contrast(self.lte.contrastive, self._pretrained, finetuned)
        for model in self._earlier:
            contrast.add_snapshot(model)
        return contrast

    @property
    def _routed(self) -> Routed:
        """Anew at each use: adapters come and go between steps."""
        return Routed.of(self.lte_model, "LTETrainer")

    @property
    def stage(self) -> Stage:
        return "soft" if self._routed.routers[0].mode == "soft" else "hard"

    def call_model_init(self, trial: object = None) -> nn.Module:
        """How Trainer gets a new model for every `train`; the one that is there, while it trains or `fit` runs."""
        return self.model if self._keeps_model else super().call_model_init(trial)

    @contextmanager
    def _one_model(self, trial: object = None) -> Iterator[None]:
        """A new model, where `model_init` makes them, for all that trains inside."""
        outer = self._keeps_model
        if self.model_init is not None and not outer:
            set_seed(self.args.seed)
            self._adopt(self.call_model_init(trial))
        self._keeps_model = True
        try:
            yield
        finally:
            self._keeps_model = outer

    def fit(self, resume_from_checkpoint: bool | str | None = None) -> None:
        """Soft stage, then hard stage, each an own `train()` with an own optimizer and folder (soft/, hard/).

        resume_from_checkpoint: True goes on from the newest whole checkpoint, wherever the last run was killed.
        """
        base, steps = self.args.output_dir, self.args.max_steps
        stages: tuple[tuple[Stage, int | None], ...] = (("soft", self.lte.soft_steps), ("hard", self.lte.hard_steps))
        try:
            with self._one_model():
                for number, (stage, stage_steps) in enumerate(stages):
                    if stage_steps == 0:
                        continue
                    set_seed(self.args.seed + number)  # a stage that is resumed starts as one that follows another
                    self.args.output_dir = str(Path(base) / stage)
                    self.args.max_steps = steps if stage_steps is None else stage_steps
                    self.optimizer, self.lr_scheduler, self._next_stage = None, None, stage
                    self._seen.clear()  # what the hard stage does not measure is not logged as the soft stage had it
                    self.train(resume_from_checkpoint=resume_from_checkpoint)
                    self.finish_stage()
                    if stage == "soft" and self.contrast is not None:
                        self.contrast.add_snapshot(self.lte_model)
        finally:
            self.args.output_dir, self.args.max_steps, self._next_stage = base, steps, None

    def finish_stage(self, batches: Iterable[Batch] | None = None) -> dict[str, float]:
        """Settle thresholds on `batches` (None: up to 8 of the evaluation set, else of the training set), and log.

        Of several evaluation sets in turn. Of several processes the first one's result counts, for all of them.
        """
        if not self.lte.settle:
            return {}
        stage = self.stage
        batches = list(self._held_out() if batches is None else batches)
        shares: dict[str, float] = settle(self.lte_model, batches, self.target_sparsity, budget=self.lte.budget)
        perplexity = held_out_perplexity(self.lte_model, batches)
        for buffer in (b for router in self._routed.all_routers() for b in router.buffers()):
            buffer.copy_(broadcast(buffer))
        shares, perplexity = broadcast_object_list([shares, perplexity])
        end = {"eta": self.controller.eta, "held_out_sparsity": sum(shares.values()) / len(shares)}
        if perplexity is not None:
            end["held_out_perplexity"] = perplexity
        self.log({f"lte_{stage}_stage_{k}": v for k, v in end.items()})
        self._measured = (
            self._thresholds(),
            {
                "held_out": f"{len(batches)} batches",
                "dense_perplexity": None,
                "perplexity": perplexity,
                "sparsity": shares,
                "tokens_per_s": None,
            },
        )
        return shares

    def _thresholds(self) -> list[float]:
        return [float(router.threshold) for router in self._routed.routers]

    def _held_out(self) -> list[dict[str, Tensor]]:
        """What a stage is settled on: batches of the evaluation set, or of each in turn, else of the training set. Of
        several processes each has read a part, and all get the whole: what one process would settle on.
        """
        sets = self.eval_dataset
        names = list(sets) if isinstance(sets, dict) else [] if sets is None else [None]
        loaders = [self.get_eval_dataloader(name) for name in names] or [self.get_train_dataloader()]
        in_turn = (batch for row in zip_longest(*loaders) for batch in row if batch is not None)
        most = -(-max(HELD_OUT, len(loaders)) // self.accelerator.num_processes)
        mine = [send_to_device(batch, "cpu") for batch in islice(in_turn, most)]  # tensors travel in pickles
        return [self._prepare_inputs(batch) for batch in gather_object(mine)]

    def train(
        self, resume_from_checkpoint: bool | str | None = None, trial: object = None, **kwargs: object
    ) -> TrainOutput | None:
        refuse_reentrant(self.args)
        self._measured = None
        with (
            self._one_model(trial),
            stage_options(self.lte_model, self.lte, self._next_stage or self.stage),
            telling_tokens(self._routed, keep=True),
        ):
            if resume_from_checkpoint is True:
                # none is whole where the kill came before the first: the stage begins anew
                resume_from_checkpoint = last_complete(self.args.output_dir)
            if resume_from_checkpoint and is_finished(str(resume_from_checkpoint)):
                self._load_from_checkpoint(str(resume_from_checkpoint))
                return None
            self.model_wrapped = self.model  # DDP shares the gradients of what learned when it was made: anew a stage
            return super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self._write_card(output_dir)

    def create_model_card(
        self, *args: object, license: str | None = None, tags: str | list[str] | None = None, **kwargs: object
    ) -> None:
        """Of a routed model: ours in place of Trainer's, which Trainer asks for before it pushes to the hub."""
        if is_saved_routed(self.model):
            self._write_card(license=license, tags=[tags] if isinstance(tags, str) else tags or ())
        else:
            super().create_model_card(*args, license=license, tags=tags, **kwargs)

    def _write_card(self, folder: str | None = None, *, license: str | None = None, tags: Sequence[str] = ()) -> None:
        """With what the last stage's end measured, where nothing has moved the thresholds since."""
        if self.args.should_save and is_saved_routed(self.model):
            at, measured = self._measured or ([], None)
            still = measured if at == self._thresholds() else None
            write_card(self.model, folder or self.args.output_dir, still, license=license, tags=tags)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            save_apart(self.model, self._routed, folder)
            mark_complete(folder, {"stage": self.stage, "controller": self.controller.state_dict()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_apart(self.lte_model, Path(resume_from_checkpoint))
        file = Path(resume_from_checkpoint) / STATE_FILE
        if file.is_file():
            self.controller = SparsityController.from_state(json.loads(file.read_text())["controller"])

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
        if learns and self.contrast is not None:
            inputs = {**inputs, "output_hidden_states": True}  # type: ignore[dict-item]  # a flag among tensors
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
        if self.teacher is not None and self.lte.distill:
            self.teacher.to(self.args.device)
            kl = divergence(self.teacher, self.lte_model, inputs, outputs.logits, mask)
            loss = (1.0 - self.lte.distill) * loss + self._per_item(self.lte.distill * kl[0], kl[1], items)
        if self.contrast is not None:
            given = {name: value for name, value in inputs.items() if name != "output_hidden_states"}
            term = self.contrast.loss(last_hidden(outputs), given, labels)
            self._seen["contrastive"] = term.detach()
            counted = term.new_tensor(float(len(outputs.logits)) if mask is None else float(mask.sum()))
            loss = loss + self._per_item(term * counted, counted, items)
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


class LTETrainer(LTETrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the two stages of paper section 4.3.

    Arguments: those of transformers.Trainer, and `lte`, `teacher`, `pretrained` and `snapshots` of LTETrainerMixin.
    Raises: NotTransformedError, LoweredError, TrainingError, ConfigError.
    Example:
        >>> from transformers import TrainingArguments
        >>> arguments = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        >>> rows = [{"input_ids": row, "labels": row} for row in ids]
        >>> trainer = ltepass.LTETrainer(model, arguments, train_dataset=rows)
        >>> trainer.fit()  # doctest: +ELLIPSIS
        {...
    """


class _Guard(TrainerCallback):  # type: ignore[misc]
    """Looks at gradients before they are applied, and steers after."""

    def __init__(self, trainer: LTETrainerMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        grads = [p.grad for p in self.trainer.lte_model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        if not torch.isfinite(norm):
            self.trainer._stop("a gradient is not finite")

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        self.trainer.steer((state.global_step + 1) / max(1, state.max_steps))
