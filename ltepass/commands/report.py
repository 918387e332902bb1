"""`ltepass report`: the sites of a saved model, on a text if one is given, and a page with all that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ltepass
from ltepass.commands.bench_tables import label, token_plot
from ltepass.commands.load import load, tokenizer_of
from ltepass.commands.training_run import CHECKPOINTS, RECORD, Losses, Trained, losses_of
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.measure.records import TokenRecord, read
from ltepass.measure.sparsity import sparsity_curve
from ltepass.measure.token_bytes import weights_read
from ltepass.pages import plots
from ltepass.pages.html import note, plot, section, table
from ltepass.routed.report_tables import Report, span
from ltepass.routed.routed import is_transformed
from ltepass.whole_file import text_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

FrontierPoint = tuple[float, float, float]  # sparsity asked for, perplexity, sparsity measured


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """text: on which scores, use and sparsity are measured, `limit` blocks of `length` tokens at most; sparsities: of
    the frontier, measured on it; training: a folder with the records of a training, FOLDER's own if None; bench: rows
    of `ltepass bench model --out`."""

    text: Path | None = None
    length: int = 512
    limit: int = 16
    sparsities: Sequence[float] = ()
    training: Path | None = None
    bench: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.sparsities and self.text is None:
            raise ConfigError("--sparsities measures a frontier; expected --text with it")
        for path in (self.training, self.bench):
            if path is not None and not path.exists():
                raise ConfigError(f"{path} is not there; expected what a training or `ltepass bench` wrote")


def report(folder: str, options: ReportOptions, page: Path | None = None) -> Report:
    """The report of a saved model. page: where its HTML goes.

    Raises ConfigError where the text is too short, the model is dense or the page's folder is missing.
    """
    if page is not None and not page.parent.is_dir():
        raise ConfigError(f"{page.parent} is no folder; expected one that the page can be written to; make it first")
    model = load(folder, options.device)
    if not is_transformed(model):
        raise ConfigError(f"{folder} is a dense model; expected one with routers, as `ltepass train` writes it")
    blocks = None if options.text is None else _blocks(folder, options.text, options)
    found = ltepass.report(model, batches=None if blocks is None else blocks[:, None].to(model.device))
    if page is not None:
        more = [*_training(folder, options), *_frontier(model, blocks, options), *_speed(model, found, options)]
        page.write_text(found.to_html(f"ltepass report of {folder}", more), encoding="utf-8")
    return found


def _blocks(folder: str, text: Path, options: ReportOptions) -> Tensor:
    blocks = token_blocks(tokenizer_of(folder), text_of(text), options.length, options.limit)
    if not len(blocks):
        raise ConfigError(f"{text} has no whole block of {options.length} tokens; pass more text or a smaller --length")
    return blocks


def _training(folder: str, options: ReportOptions) -> Iterator[str]:
    """Losses and the closing table of `ltepass train`, or the losses of LTETrainer's folder."""
    where = options.training or Path(folder) / CHECKPOINTS
    record = next((path for path in (where / RECORD, where / CHECKPOINTS / RECORD) if path.is_file()), None)
    try:
        result: Trained | None = None if record is None else json.loads(record.read_text())["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record} is no record of a training ({error}); pass --training another folder") from error
    kept = None if result is None else result.get("losses")
    losses = kept or losses_of(where)
    if losses or result:
        drawn = [_loss_plot(losses)] if losses else []
        yield section("Training", *drawn, *([] if result is None else [_trained(result)]))


def _loss_plot(losses: dict[str, Losses]) -> str:
    rows = [
        (stage, str(step), f"{loss:.4f}")
        for stage, points in losses.items()
        for step, loss in points[:: max(1, len(points) // 10)]
    ]
    numbers = table(("stage", "step", "loss"), rows, "training loss")
    caption = "Training loss, in nats per token, of each stage"
    return plot(lambda: plots.curves(losses, "optimizer step", "loss (nats per token)"), caption, numbers)


def _trained(result: Trained) -> str:
    pairs = {"perplexity": (result["dense_perplexity"], result["perplexity"])}
    if speed := result["tokens_per_s"]:
        pairs["tokens/s of decoding, eager"] = (speed["dense"], speed["lowered"])
    rows = [
        (what, f"{dense:.3f}", f"{ours:.3f}", f"x{ours / dense:.3f}")
        for what, (dense, ours) in pairs.items()
        if dense is not None and ours is not None
    ]
    rows.append(("inactive neurons, min / mean / max", "0%", span(list(result["sparsity"].values())), "-"))
    headings = ("", "dense, as it came", "trained, sparse", "ratio")
    return note(f"Measured on {result['held_out']} of held-out text.") + table(headings, rows, "what training gave")


def _frontier(model: PreTrainedModel, blocks: Tensor | None, options: ReportOptions) -> Iterator[str]:
    if blocks is None or not options.sparsities:
        return
    ltepass.set_mode(model, "hard")
    points = list(sparsity_curve(model, blocks, sorted(options.sparsities)))
    rows = [(f"{asked:.0%}", f"{share:.1%}", f"{value:.3f}") for asked, value, share in points]
    numbers = table(("set_sparsity", "inactive neurons", "perplexity"), rows, "perplexity by sparsity")
    caption = f"Perplexity at other sparsities of this model, on {blocks.shape[0]} x {blocks.shape[1]} tokens"
    line = {"this model": [(100 * share, value) for _, value, share in points]}
    drawn = plot(
        lambda: plots.curves(line, "inactive neurons (%)", "perplexity", points=True),
        caption,
        numbers,
        alt=f"{caption}: {'; '.join(f'{value:.2f} at {share:.0%}' for _, value, share in points)}",
    )
    yield section("Frontier", drawn)


def _speed(model: PreTrainedModel, found: Report, options: ReportOptions) -> Iterator[str]:
    """Predicted from bytes, and measured where rows of a bench are given; the model is dense afterwards."""
    records = [] if options.bench is None else read(options.bench, TokenRecord)
    shares = [found.sparsity.get(name, scores.inactive) for name, scores in found.scores.items()]
    parts = [_predicted(model, 1 - sum(shares) / len(shares))] if shares else []
    if records:
        rows = [(label(r), f"{r.ms:.2f}", f"{r.p99_ms:.2f}", f"{r.byte_ideal_ms:.2f}") for r in records]
        numbers = table(("side", "ms, median", "ms, p99", "byte ideal, ms"), rows, "time of one token")
        caption = f"Measured time of one token of {records[0].model}; {records[0].machine}"
        parts.append(plot(lambda: token_plot(records), caption, numbers))
    if parts:
        yield section("Speed", *parts)


@torch.no_grad()
def _predicted(model: PreTrainedModel, active: float) -> str:
    ours = weights_read(model, active)
    dense = weights_read(ltepass.remove(model))
    return note(
        f"Predicted from bytes: a token reads {ours / 1e6:.2f} MB of weights and routers, the dense model "
        f"{dense / 1e6:.2f} MB. Decoding that waits for memory alone would be x{dense / ours:.2f} as fast."
    )
