"""`ltepass train`: transform a dense model, calibrate and train it on a text, save it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ltepass
from ltepass.commands.load import load
from ltepass.config import Budget, LTEConfig, RouterKind
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.grouping_methods import AUTO
from ltepass.routed.report_tables import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START_TOKENS = 49_152  # that routers and the warm start are fitted on, at most
START_BYTES = 512_000_000  # of one FFN's hidden units, of which the warm start holds several copies


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Of `ltepass train`; the defaults are what measured best at up to 61,440 tokens (examples/results/ablations.md).

    steps: optimizer steps of the hard stage; soft_steps: of the soft stage before it; warm_start: refit each FFN before
    the first step. With no steps of either stage nothing is trained: routers and warm start are all. router, budget,
    hidden_sparsity, input_sparsity: as in `LTEConfig`; length: tokens of a block; stages: what `LTESettings` takes
    beside these.
    """

    target_sparsity: float = 0.5
    router: RouterKind = "linear"
    group_size: int | None = None
    grouping: str = AUTO
    steps: int = 100
    batch: int = 4
    length: int = 512
    learning_rate: float = 1e-4
    seed: int = 0
    device: str = "cpu"
    soft_steps: int = 0
    warm_start: bool = True
    budget: Budget = "layer"
    hidden_sparsity: float = 0.0
    input_sparsity: float = 0.0
    stages: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return self.steps + self.soft_steps > 0


def train(name: str, text: str, out: Path, options: TrainOptions) -> Report:
    """Transform a dense model, calibrate on the text, train both stages on it, save to `out` with the tokenizer.

    The last tenth of the blocks is held out: the stages' thresholds are settled on it. Returns the report with the
    sparsity measured there. Raises ConfigError where the text is too short, and what transform and the trainer raise.
    """
    from transformers import AutoTokenizer, TrainingArguments

    from ltepass.training.settings import LTESettings
    from ltepass.training.stages import settle

    if options.steps < 0 or options.soft_steps < 0:
        raise ConfigError(
            f"steps is {options.steps} and soft_steps is {options.soft_steps}; expected 0 (no such stage) or more"
        )
    lte = LTESettings(soft_steps=options.soft_steps, hard_steps=options.steps, **options.stages)
    model, tokenizer = load(name, options.device), AutoTokenizer.from_pretrained(name)
    blocks = token_blocks(tokenizer, text, options.length)
    held_out = max(1, len(blocks) // 10)
    if len(blocks) < 2:
        raise ConfigError(
            f"the text has {len(blocks)} whole blocks of {options.length} tokens; expected at least 2; pass more text "
            "or a smaller --length"
        )
    data = [{"input_ids": block, "labels": block} for block in blocks]
    _start(model, blocks[:-held_out][: max(1, START_TOKENS // options.length)].to(model.device), options)
    train, held = data[:-held_out], data[-held_out:]
    if not options.trains:
        settle(model, torch.split(blocks[-held_out:].to(model.device), options.batch), options.target_sparsity)
        return _saved(model, tokenizer, blocks[-held_out:], out)
    args = TrainingArguments(
        str(out / "training"),
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        report_to="none",
    )
    trainer = ltepass.LTETrainer(model=model, args=args, lte=lte, train_dataset=train, eval_dataset=held)
    trainer.fit()
    return _saved(model, tokenizer, blocks[-held_out:], out)


def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: torch.Tensor, out: Path) -> Report:
    """Save in hard mode; the report on held-out blocks [n, length]."""
    ltepass.set_mode(model, "hard")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.eval()
    return ltepass.report(model, ltepass.measure_sparsity(model, held_out[:, None].to(model.device)))


def _start(model: PreTrainedModel, blocks: torch.Tensor, options: TrainOptions) -> None:
    """Transform, and fit the routers and the warm start to blocks [n, length] of training text."""
    from ltepass.calibration.refit_down import warm_start

    config = LTEConfig(
        target_sparsity=options.target_sparsity,
        router=options.router,
        group_size=options.group_size or "auto",
        grouping=options.grouping,
        budget=options.budget,
        hidden_sparsity=options.hidden_sparsity,
        input_sparsity=options.input_sparsity,
        seed=options.seed,
    )
    batches = torch.split(blocks, options.batch)
    ltepass.transform(model, config=config, calibration=batches)
    if options.warm_start:
        widest = max(site.d_ff for site in ltepass.report(model).sites)
        warm_start(model, blocks[: max(1, START_BYTES // (4 * widest * options.length))])
    elif not options.trains:
        ltepass.calibrate(model, batches, inputs="hard")  # nothing else will bring the inputs back
