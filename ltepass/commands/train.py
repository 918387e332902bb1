"""`ltepass train`: transform a dense model, calibrate and train it on a text, save it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ltepass
from ltepass.commands.bench_tables import threads_of
from ltepass.commands.load import load, require_device, tokenizer_of
from ltepass.commands.training_data import Columns, digest, read_rows, tokenised
from ltepass.commands.training_run import ROWS, Trained, TrainingRun, losses_of, measured
from ltepass.config import Budget, LTEConfig, RouterKind
from ltepass.errors import ConfigError
from ltepass.grouping_methods import AUTO
from ltepass.routed.report_tables import span
from ltepass.routed.routed import is_transformed
from ltepass.saving.model_card import Measured, write_card
from ltepass.training.settings import LTESettings

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

START_TOKENS = 49_152  # that routers and the warm start are fitted on, at most
START_BYTES = 512_000_000  # of one FFN's hidden units, of which the warm start holds several copies
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Of `ltepass train`; the defaults are what measured best at up to 61,440 tokens (examples/results/ablations.md).

    steps: optimizer steps of the hard stage; soft_steps: of the soft stage before it; warm_start: refit each FFN before
    the first step. With no steps of either stage nothing is trained: routers and warm start are all. router, budget,
    hidden_sparsity, input_sparsity: as in `LTEConfig`; length: tokens of a block; split: of a data set; stages: what
    `LTESettings` takes beside these.
    """

    target_sparsity: float = 0.5
    router: RouterKind = "linear"
    group_size: int | None = None
    grouping: str = AUTO
    steps: int = 100
    batch: int = 4
    length: int = 512
    split: str = "train"
    learning_rate: float = 1e-4
    seed: int = 0
    device: str = "cpu"
    soft_steps: int = 0
    warm_start: bool = True
    budget: Budget = "layer"
    hidden_sparsity: float = 0.0
    input_sparsity: float = 0.0
    stages: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 0 or self.soft_steps < 0:
            raise ConfigError(
                f"steps is {self.steps} and soft_steps is {self.soft_steps}; expected 0 (no such stage) or more"
            )
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate is {self.learning_rate}; expected a number above 0")

    @property
    def trains(self) -> bool:
        return self.steps + self.soft_steps > 0


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How a training is kept, which changes nothing of its result. save_every: steps from a checkpoint to the next."""

    save_every: int = 50
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise ConfigError(f"--save-every is {self.save_every}; expected 1 or more")


def train(
    name: str, source: str, out: Path, options: TrainOptions, keeping: Keeping | None = None, say: Say = lambda _: None
) -> Trained:
    """Transform a dense model, calibrate on the text, train both stages on it, save to `out` with the tokenizer.

    The last tenth of the blocks is held out: the stages' thresholds are settled on it, and what came out is measured
    there. A call that was killed goes on from its last checkpoint when it is made again, to the same bits; one that was
    finished gives what was measured. source: see `read_rows`; say: hears what begins.
    Raises ConfigError where there is too little text, and what transform and the trainer raise.
    """
    keeping, stages = keeping or Keeping(), _stages(options)
    _config(options)  # which says what is wrong with it, before anything is read
    require_device(options.device)
    tokenizer = tokenizer_of(name)
    data = tokenised(read_rows(source, options.split), tokenizer, options.length)
    n = len(data["labels"])
    if n < 2:
        raise ConfigError(
            f"{source} makes {n} whole blocks of {options.length} tokens; expected at least 2; pass more text or a "
            "smaller --length"
        )
    asked = {"model": name, "data": source, "data_digest": digest(data), **dataclasses.asdict(options)}
    run = TrainingRun(out, asked, resume=keeping.resume, overwrite=keeping.overwrite)
    if run.result is not None:
        say(f"{out} holds this training, finished; --overwrite trains anew")
        return run.result
    held = max(1, n // 10)
    learned, held_out = _rows(data, 0, n - held), _rows(data, n - held, n)
    if run.resumes:
        say(f"{out} holds this training, not ended: going on from its last checkpoint")
    say(f"loading {name}")
    model = load(name, options.device)
    if is_transformed(model):
        raise ConfigError(f"{name} holds routers already; expected a dense model, such as the one that it was made of")
    _start(model, learned, options, say)
    run.begin()
    if options.trains:
        _train(model, (learned, held_out), options, stages, run.checkpoints, keeping.save_every)
    else:
        ltepass.settle(model, _batches(held_out, options.batch), options.target_sparsity)
    ltepass.set_mode(model, "hard")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    say(f"saved to {out}; measuring it")
    measurable = {key: column.to(model.device) for key, column in _rows(held_out, 0, ROWS).items()}
    found: Trained = {
        **measured(model, load(name, options.device), measurable),
        "losses": losses_of(run.checkpoints),
    }
    write_card(model, out, found)
    return run.finish(found)


def _stages(options: TrainOptions) -> LTESettings:
    return LTESettings(soft_steps=options.soft_steps, hard_steps=options.steps, **options.stages)


def _rows(columns: Columns, start: int, stop: int) -> Columns:
    return {name: column[start:stop] for name, column in columns.items()}


def _batches(columns: Columns, size: int) -> list[Columns]:
    """What a model reads of it."""
    inputs = {name: column for name, column in columns.items() if name != "labels"}
    return [_rows(inputs, i, i + size) for i in range(0, len(columns["labels"]), size)]


def _train(
    model: PreTrainedModel,
    data: tuple[Columns, Columns],
    options: TrainOptions,
    stages: LTESettings,
    folder: Path,
    save_every: int,
) -> None:
    """Both stages, from the newest checkpoint in `folder` where there is one. data: learned, and held out."""
    from transformers import TrainingArguments

    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        use_cpu=options.device == "cpu",
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,  # a kill may leave the newest in parts
        logging_steps=_steps_of_a_log(save_every, max(options.soft_steps, options.steps)),
        report_to="none",
    )
    train, held = ([{k: v[i] for k, v in part.items()} for i in range(len(part["labels"]))] for part in data)
    trainer = ltepass.LTETrainer(model=model, args=args, lte=stages, train_dataset=train, eval_dataset=held)
    trainer.fit(resume_from_checkpoint=True)


def _steps_of_a_log(save_every: int, steps: int) -> int:
    """For 20 logs or more; every checkpoint ends one, so that a loss is of the same steps after a kill."""
    return max(n for n in range(1, save_every + 1) if save_every % n == 0 and n <= max(1, steps // 20))


def _config(options: TrainOptions) -> LTEConfig:
    return LTEConfig(
        target_sparsity=options.target_sparsity,
        router=options.router,
        group_size=options.group_size or "auto",
        grouping=options.grouping,
        budget=options.budget,
        hidden_sparsity=options.hidden_sparsity,
        input_sparsity=options.input_sparsity,
        seed=options.seed,
    )


def _start(model: PreTrainedModel, learned: Columns, options: TrainOptions, say: Say) -> None:
    """Transform, and fit the routers and the warm start to the first blocks that are learned."""
    from ltepass.calibration.refit_down import warm_start

    start = _rows(learned, 0, max(1, START_TOKENS // options.length))
    batches = _batches(start, options.batch)
    say(f"fitting routers on {len(start['labels'])} blocks of {options.length} tokens")
    ltepass.transform(model, config=_config(options), calibration=batches)
    if options.warm_start:
        widest = max(site.d_ff for site in ltepass.report(model).sites)
        (refit,) = _batches(_rows(start, 0, fit := max(1, START_BYTES // (4 * widest * options.length))), fit)
        say(f"refitting FFNs on {len(refit['input_ids'])} blocks")
        warm_start(model, refit)
    elif not options.trains:
        ltepass.calibrate(model, batches, inputs="hard")  # nothing else will bring the inputs back


def trained_table(found: Measured) -> Table:
    from rich.table import Table

    table = Table(title=f"measured on {found['held_out']} of held-out text", title_justify="left")
    for heading in ("", "dense, as it came", "trained, sparse", "ratio"):
        table.add_column(heading, overflow="fold")
    table.add_row("perplexity", *_pair(found["dense_perplexity"], found["perplexity"], 3))
    table.add_row("inactive neurons, min / mean / max", "0%", span(list(found["sparsity"].values())), "")
    speed = found["tokens_per_s"]
    if speed is not None:
        what = f"tokens/s of decoding, eager, {threads_of(torch.get_num_threads())}"
        table.add_row(what, *_pair(speed["dense"], speed["lowered"], 1))
    return table


def _pair(dense: float | None, ours: float | None, digits: int) -> tuple[str, str, str]:
    if dense is None or ours is None:
        return "not measured", "not measured", ""
    return f"{dense:.{digits}f}", f"{ours:.{digits}f}", f"x{ours / dense:.3f}"
