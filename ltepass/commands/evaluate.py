"""`ltepass eval`: perplexity and sparsity of a saved model on texts, and what it costs over dense models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import ltepass
from ltepass.commands.load import load, tokenizer_of
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.measure.quality import compare, perplexity, repetition, require_enough, token_losses
from ltepass.measure.sparsity import counting_inactive, sparsity_curve
from ltepass.routed.report_tables import span
from ltepass.routed.routed import Routed, state_of

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel


class Cell(NamedTuple):
    """A figure as the table shows it, and as a program reads it."""

    shown: str
    value: object


Cells = dict[str, Cell]
PROMPT_TOKENS, NEW_TOKENS = 32, 64


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """sparsities: rows of `set_sparsity`, from the saved table; against: dense models, the better one on each text;
    length: tokens of a block; limit: blocks of a text at most; continuations: greedy ones, of the beginnings of as many
    blocks, for the share of 4-grams that they repeat."""

    sparsities: Sequence[float] = ()
    against: Sequence[str] = ()
    length: int = 512
    limit: int | None = 16
    continuations: int = 0
    device: str = "cpu"


def evaluate(folder: str, texts: Mapping[str, str], options: EvalOptions) -> dict[str, Cells]:
    """A column a text, by name: perplexity of a saved model in hard and in dense mode, its sparsity,
    and the comparison with dense models where some are given.

    Raises ConfigError where a text is too short, or a model to compare with has routers, before anything is measured.
    """
    model = load(folder, options.device)
    tokenizer = tokenizer_of(folder)
    blocks = {name: token_blocks(tokenizer, text, options.length, options.limit) for name, text in texts.items()}
    for name, found in blocks.items():
        if not len(found):
            raise ConfigError(
                f"{name} has no whole block of {options.length} tokens; pass more text or a smaller --length"
            )
        if options.against:
            require_enough(len(found))
    dense = {name: load(name, options.device) for name in options.against}
    for name, other in dense.items():
        if state_of(other) is not None:
            raise ConfigError(f"--against {name} holds routers; expected a dense model to compare with")
    return {name: _column(model, found, dense, options) for name, found in blocks.items()}


def _column(
    model: PreTrainedModel, blocks: Tensor, dense: Mapping[str, PreTrainedModel], options: EvalOptions
) -> Cells:
    n, length = blocks.shape
    cells = {"text": Cell(f"{n} x {length} tokens", {"blocks": n, "length": length})}
    if state_of(model) is None:
        return cells | _quality(model, dense, blocks, "perplexity") | _repetition(model, dense, blocks, options)
    ltepass.set_mode(model, "hard")
    with counting_inactive(Routed.trained(model, "eval")) as shares:
        cells |= _quality(model, dense, blocks, "perplexity, hard mode")
    inactive = shares()
    cells["inactive neurons, per site min / mean / max"] = Cell(span(list(inactive.values())), inactive)
    cells |= _repetition(model, dense, blocks, options)
    for s, value, measured in sparsity_curve(model, blocks, options.sparsities):
        found = {"perplexity": value, "inactive": measured}
        cells[f"set_sparsity {s:g}: perplexity, inactive neurons"] = Cell(f"{value:.3f}, {measured:.1%}", found)
    ltepass.set_mode(model, "dense")
    cells["perplexity, every neuron active"] = _number(perplexity(model, blocks))
    return cells


def _quality(model: PreTrainedModel, dense: Mapping[str, PreTrainedModel], blocks: Tensor, what: str) -> Cells:
    """Over the dense model that is best on this text: one that was tuned on another may be worse than it was."""
    if not dense:
        return {what: _number(perplexity(model, blocks))}
    names = list(dense)
    best = min(names, key=lambda n: float(token_losses(dense[n], blocks).mean())) if len(names) > 1 else names[0]
    found = compare(model, dense[best], blocks)
    return {
        what: _number(found.perplexity),
        "perplexity, dense": Cell(
            f"{found.dense_perplexity:.3f} ({best})", {"perplexity": found.dense_perplexity, "model": best}
        ),
        "perplexity over dense, 95 % interval": Cell(str(found.ratio), found.ratio),
        "KL(dense || this), nats per token": Cell(f"{found.kl:.4f}", found.kl),
        "same likeliest next token as dense": _share(found.agreement),
    }


def _number(value: float) -> Cell:
    return Cell(f"{value:.3f}", value)


def _share(value: float) -> Cell:
    return Cell(f"{value:.1%}", value)


def _repetition(
    model: PreTrainedModel, dense: Mapping[str, PreTrainedModel], blocks: Tensor, options: EvalOptions
) -> Cells:
    prompts = blocks[: options.continuations, :PROMPT_TOKENS]
    if not len(prompts):
        return {}
    what = f"repeated 4-grams, {len(prompts)} greedy continuations of {NEW_TOKENS} tokens"
    sides = {what: model, **{f"{what}, {name}": other for name, other in dense.items()}}
    return {name: _share(repetition(side, prompts, NEW_TOKENS)) for name, side in sides.items()}


def eval_table(columns: Mapping[str, Cells]) -> Table:
    """A row a figure, a column a text."""
    from rich.table import Table
    from rich.text import Text

    table = Table("")
    for name in columns:
        table.add_column(Text(name), overflow="fold")
    for what in next(iter(columns.values())):
        table.add_row(what, *(cells[what].shown for cells in columns.values()))
    return table


def eval_json(columns: Mapping[str, Cells]) -> dict[str, dict[str, object]]:
    """The same as numbers: by text, by figure; shares are of 1, the inactive ones by site."""
    return {name: {what: cell.value for what, cell in cells.items()} for name, cells in columns.items()}
