"""What a training came to: quality and speed beside the dense model that it began with, measured on held-out rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

import ltepass
from ltepass.measure.decoding_speed import time_decoding
from ltepass.routed.report_tables import span
from ltepass.training.stages import held_out_perplexity

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

ROWS = 16  # that are measured, at most
NEW_TOKENS, WARMUP = 40, 8  # decoded, and of them not timed


class Trained(TypedDict):
    """Perplexities over label tokens of held-out rows; sparsity: by site; tokens_per_s: None where rows are short."""

    held_out: str
    dense_perplexity: float | None
    perplexity: float | None
    sparsity: dict[str, float]
    tokens_per_s: dict[str, float] | None


def measured(model: PreTrainedModel, dense: PreTrainedModel, held_out: Mapping[str, Tensor]) -> Trained:
    """model: in hard mode, and lowered afterwards. held_out: columns [n, T], on the models' device."""
    rows = [{name: column[i : i + 1] for name, column in held_out.items()} for i in range(len(held_out["labels"]))]
    n, length = held_out["labels"].shape
    model.eval()
    found: Trained = {
        "held_out": f"{n} x {length} tokens",
        "dense_perplexity": held_out_perplexity(dense, rows),
        "perplexity": held_out_perplexity(model, rows),
        "sparsity": ltepass.measure_sparsity(model, rows),
        "tokens_per_s": None,
    }
    row = rows[0]
    ids = row["input_ids"][0, : int(row["attention_mask"].sum()) if "attention_mask" in row else length]
    prompt, tokens = ids[: len(ids) // 4], ids[len(ids) // 4 :][:NEW_TOKENS]
    if len(prompt) and len(tokens) > 4:
        sides = {"dense": dense, "lowered": ltepass.lower(model, scope="ffn")}
        times = time_decoding(sides, prompt, tokens, warmup=min(WARMUP, len(tokens) // 2))
        found["tokens_per_s"] = {side: 1 / statistics.median(seconds) for side, seconds in times.items()}
    return found


def trained_table(found: Trained) -> Table:
    from rich.table import Table

    table = Table(title=f"measured on {found['held_out']} of held-out text", title_justify="left")
    for heading in ("", "dense, as it came", "trained, sparse", "ratio"):
        table.add_column(heading, overflow="fold")
    table.add_row("perplexity", *_pair(found["dense_perplexity"], found["perplexity"], 3))
    table.add_row("inactive neurons, min / mean / max", "0%", span(list(found["sparsity"].values())), "")
    speed = found["tokens_per_s"]
    if speed is not None:
        what = f"tokens/s of decoding, eager, {torch.get_num_threads()} threads"
        table.add_row(what, *_pair(speed["dense"], speed["lowered"], 1))
    return table


def _pair(dense: float | None, ours: float | None, digits: int) -> tuple[str, str, str]:
    if dense is None or ours is None:
        return "not measured", "not measured", ""
    return f"{dense:.{digits}f}", f"{ours:.{digits}f}", f"x{ours / dense:.3f}"
