"""The paper's two stages on transformers' Trainer. The mixin goes before any Trainer class: TRL's work as well."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, set_seed

from ltepass.errors import TrainingError
from ltepass.routed.batches import Batch
from ltepass.routed.padding import telling_tokens
from ltepass.training.checkpoints import (
    STATE_FILE,
    is_finished,
    last_complete,
    load_apart,
    mark_complete,
    save_apart,
    saved_apart,
)
from ltepass.training.controller import SparsityController
from ltepass.training.settings import LTESettings
from ltepass.training.stage_options import stage_options
from ltepass.training.stages import Stage, held_out_perplexity, settle
from ltepass.training.training_step import TrainingStepMixin

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.trainer_utils import TrainOutput

HELD_OUT = 8  # batches that a stage is settled on

__all__ = ["LTESettings", "LTETrainer", "LTETrainerMixin"]


class LTETrainerMixin(TrainingStepMixin):
    """Adds the auxiliary loss, the controller and the stages to a Trainer. Paper section 4.3.

    `fit()` runs both stages. `train()` alone runs the stage of the routers' mode.

    Arguments:
        lte: settings of the stages; None takes `LTESettings()`. All others go to the Trainer behind the mixin.
        teacher: of `LTESettings.distill`; None takes a copy of the model with every neuron active, as it is now.
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

    _keeps_model = False
    _next_stage: Stage | None = None  # of `fit`; else the routers' mode says it

    def __init__(
        self, *args: object, lte: LTESettings | None = None, teacher: nn.Module | None = None, **kwargs: object
    ) -> None:
        super().__init__(*args, lte=lte, teacher=teacher, **kwargs)
        if saved_apart(self.model, self._routed):
            warnings.warn(
                "the routers learn inside the base model, and an adapter's folder does not hold them; expected "
                "modules_to_save=['router'] in the adapter's config; add it, or save the base model as well",
                stacklevel=2,
            )

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
                    self.train(resume_from_checkpoint=resume_from_checkpoint)
                    self.finish_stage()
        finally:
            self.args.output_dir, self.args.max_steps, self._next_stage = base, steps, None

    def finish_stage(self, batches: Iterable[Batch] | None = None) -> dict[str, float]:
        """Settle thresholds on `batches` (None: up to 8 of the evaluation set, else of the training set), and log.

        Of several evaluation sets in turn. Of several processes the first one's batches count, for all of them.
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
        return shares

    def _held_out(self) -> list[dict[str, Tensor]]:
        """What a stage is settled on: batches of the evaluation set, or of each in turn, else of the training set."""
        sets = self.eval_dataset
        names = list(sets) if isinstance(sets, dict) else [] if sets is None else [None]
        loaders = [self.get_eval_dataloader(name) for name in names] or [self.get_train_dataloader()]
        in_turn = (batch for row in zip_longest(*loaders) for batch in row if batch is not None)
        return [self._prepare_inputs(batch) for batch in islice(in_turn, max(HELD_OUT, len(loaders)))]

    def train(
        self, resume_from_checkpoint: bool | str | None = None, trial: object = None, **kwargs: object
    ) -> TrainOutput | None:
        _refuse_reentrant(self.args)
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
            return super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)

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


class LTETrainer(LTETrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the two stages of paper section 4.3.

    Arguments: those of transformers.Trainer, and `lte` and `teacher` of LTETrainerMixin.
    Raises: NotTransformedError, LoweredError, TrainingError, ConfigError.
    Example:
        >>> from transformers import TrainingArguments
        >>> arguments = TrainingArguments(folder, max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        >>> rows = [{"input_ids": row, "labels": row} for row in ids]
        >>> trainer = ltepass.LTETrainer(model, arguments, train_dataset=rows)
        >>> trainer.fit()  # doctest: +ELLIPSIS
        {...
    """


def _refuse_reentrant(args: TrainingArguments) -> None:
    new, old = "activation_checkpointing", "gradient_checkpointing"  # transformers renames it, and mirrors it at first
    name = new if hasattr(args, new) else old
    kwargs = getattr(args, f"{name}_kwargs", None) or {}
    if getattr(args, name) and kwargs.get("use_reentrant"):
        raise TrainingError(
            f"{name}_kwargs has use_reentrant=True, which silently drops the auxiliary gradient; "
            "expected non-reentrant checkpointing; pass {'use_reentrant': False}"
        )
