"""What the command line does with a model's name: load, inspect, evaluate, continue a text."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import ltepass
from ltepass.config import Budget, LTEConfig
from ltepass.errors import ConfigError
from ltepass.grouping_methods import AUTO
from ltepass.measure.quality import perplexity, sparsity_curve
from ltepass.measure.text_blocks import token_blocks
from ltepass.routed.reporting import Report, span
from ltepass.routed.sites import state_of

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def call_by_name(name: str) -> tuple[nn.Module, object]:
    """`module:function` -> (model, example inputs or None); the function returns a model or such a pair."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be called ({error}); expected importable_module:function_name") from error
    finally:
        sys.path.pop(0)
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name!r} returned {type(model).__name__}; expected an nn.Module, or (model, example_inputs)"
        )
    return model, inputs


def load(name: str, device: str = "cpu", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model from a directory, a hub name or `module:function`, in eval mode. dtype: None takes that of the file."""
    if ":" in name and not os.path.exists(name):
        return call_by_name(name)[0].to(device=device, dtype=dtype).eval()
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto").to(device).eval()
    except OSError as error:
        raise ConfigError(
            f"{name!r} is no model directory and no model of the hub that can be reached: {error}"
        ) from error


def inspect_model(name: str, group_size: int | None = None) -> Report | str:
    """The report of a transform under identity grouping. A config is enough: weights are neither read nor made.

    Raises NoFFNFoundError with the refusals where nothing is found.
    """
    inputs = None
    if ":" in name and not os.path.exists(name):
        model, inputs = call_by_name(name)
    else:
        model = _skeleton(name)
    if state_of(model) is None:
        config = LTEConfig(group_size=group_size or "auto", grouping="identity")
        ltepass.transform(model, example_inputs=inputs, config=config)
    return ltepass.report(model)


def peak_memory() -> int:
    """Most bytes that this process ever held in memory."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _skeleton(name: str) -> PreTrainedModel:
    """The model of a directory or hub name, on the meta device; a saved LTE model is described as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name!r} is no model directory and no model of the hub that can be reached: {error}"
        ) from error
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "lte":
        return load(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


START_TOKENS = 49_152  # that routers and the warm start are fitted on, at most
START_BYTES = 512_000_000  # of one FFN's hidden units, of which the warm start holds several copies


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Of `ltepass train`; the defaults are what measured best at up to 61,440 tokens (examples/results/ablations.md).

    steps: optimizer steps of the hard stage; soft_steps: of the soft stage before it; warm_start: refit each FFN before
    the first step. With no steps of either stage nothing is trained: routers and warm start are all. budget,
    hidden_sparsity, input_sparsity: as in `LTEConfig`; length: tokens of a block; stages: what `LTESettings` takes
    beside these.
    """

    target_sparsity: float = 0.5
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
    from ltepass.calibration.warm_start import warm_start

    config = LTEConfig(
        target_sparsity=options.target_sparsity,
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


def evaluate(
    folder: str,
    text: str,
    sparsities: Iterable[float] = (),
    *,
    length: int = 512,
    limit: int | None = 16,
    device: str = "cpu",
) -> Table:
    """A rich table: perplexity of a saved model on blocks of `text`, in hard and in dense mode, and its sparsity.

    sparsities: rows of `set_sparsity`, from the saved table. Raises ConfigError where the text is too short.
    """
    from rich.table import Table
    from transformers import AutoTokenizer

    model = load(folder, device)
    blocks = token_blocks(AutoTokenizer.from_pretrained(folder), text, length, limit)
    if not len(blocks):
        raise ConfigError(f"the text has no whole block of {length} tokens; pass more text or a smaller --length")
    table = Table(title=f"{len(blocks)} x {length} tokens", show_header=False, title_justify="left")
    if state_of(model) is not None:
        sparsity = ltepass.measure_sparsity(model, blocks[:, None].to(model.device))
        table.add_row("perplexity, hard mode", f"{perplexity(model, blocks):.3f}")
        table.add_row("inactive neurons, per site min / mean / max", span(list(sparsity.values())))
        for s, value, measured in sparsity_curve(model, blocks, sparsities):
            table.add_row(f"set_sparsity {s:g}: perplexity, inactive neurons", f"{value:.3f}, {measured:.1%}")
        ltepass.set_mode(model, "dense")
    table.add_row("perplexity, every neuron active", f"{perplexity(model, blocks):.3f}")
    return table


def continue_text(
    folder: str, prompt: str, *, new_tokens: int = 64, sparsity: float | None = None, device: str = "cpu"
) -> str:
    """The prompt and its greedy continuation by a saved model, lowered. Raises LTEError where it holds no routers."""
    from transformers import AutoTokenizer

    model = load(folder, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if sparsity is not None:
        ltepass.set_sparsity(model, sparsity)
    ltepass.lower(model, scope="ffn")
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text
