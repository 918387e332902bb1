"""What `ltepass bench model` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ltepass.measure.records import ModelRecord

if TYPE_CHECKING:
    from rich.table import Table


def model_table(records: Sequence[ModelRecord]) -> Table:
    """A rich table for the terminal, one column a record."""
    from rich.table import Table

    how = "; ".join(dict.fromkeys(f"{r.how}, {r.dtype}, {threads_of(r.threads)}" for r in records))
    table = Table("sparsity asked for", title=f"one token of generate, {how}", title_justify="left")
    for r in records:
        table.add_column(f"{r.sparsity:.0%}", justify="right")
    rows = {
        "inactive neurons": [f"{1 - r.active:.1%}" for r in records],
        "perplexity": [f"{r.perplexity:.2f}" for r in records],
        "every neuron on": [f"{r.perplexity_dense:.2f}" for r in records],
        "dense, ms": [f"{r.dense_ms:.2f}" for r in records],
        "lowered, ms": [f"{r.lowered_ms:.2f}" for r in records],
        "speed-up": [f"{r.speedup:.2f}x" for r in records],
        "cap of this run": [f"{r.cap:.2f}x" for r in records],
        "share of the cap": [f"{r.share_of_cap:.0%}" for r in records],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def threads_of(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"
