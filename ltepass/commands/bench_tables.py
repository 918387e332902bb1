"""What `ltepass bench model` shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ltepass.measure.records import TokenRecord

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def token_tables(records: Sequence[TokenRecord]) -> Group:
    """One rich table for each number of threads, one row a record."""
    from rich.console import Group

    return Group(*(_table(list(rows)) for _, rows in groupby(records, lambda r: r.threads)))


def _table(records: Sequence[TokenRecord]) -> Table:
    from rich.table import Table

    first = records[0]
    table = Table(
        title=f"one token of {first.model} after {first.prompt_tokens}, {threads_of(first.threads)}, "
        f"{first.bandwidth_gbs:.1f} GB/s read",
        caption=_caption(records),
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for heading in _COLUMNS:
        words = heading in ("side", "format")
        table.add_column(heading, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for record in records:
        table.add_row(*(cell(record) for cell in _COLUMNS.values()))
    return table


def _short(value: float) -> str:
    """Four digits, or what stands before the point; a dash where nothing was measured."""
    if math.isnan(value):
        return "-"
    return f"{value:.{max(0, 3 - len(f'{value:.0f}') + 1)}f}"


_COLUMNS: dict[str, Callable[[TokenRecord], str]] = {
    "side": lambda r: r.side,
    "format": lambda r: r.format if r.format == r.head else f"{r.format} {r.head}",
    "sparse": lambda r: f"{r.sparsity:.0%}" if r.router else "-",
    "ms": lambda r: _short(r.ms),
    "p99": lambda r: _short(r.p99_ms),
    "ideal": lambda r: f"{r.share_of_byte_ideal:.0%}",
    "MB": lambda r: f"{r.weight_mb + r.kv_mb:.0f}",
    "GB/s": lambda r: f"{r.gbs:.1f}",
    "perpl.": lambda r: _short(r.perplexity),
    "prefill": lambda r: f"{r.prefill_ms:.0f}",
    "resid.": lambda r: f"{r.resident_mb:.0f}",
}


def _caption(records: Sequence[TokenRecord]) -> str:
    """What the columns mean, and what they leave out."""
    routers = dict.fromkeys(f"{r.router} router, experts of {r.group_size}" for r in records if r.router)
    runs = dict.fromkeys(f"{r.side}: {r.how}" for r in records)
    means = (
        "ms: median and p99",
        "ideal: share of it, which is reading MB (weights, keys, values) at the speed in the title",
        f"prefill: ms for {records[0].prefill_tokens} tokens",
        "resid.: MB of memory",
        *(["second format: the head's"] if any(r.format != r.head for r in records) else []),
    )
    return "; ".join([*means, *routers, *runs])


def token_plot(records: Sequence[TokenRecord]) -> str:
    """An SVG: the time of one token of each row, and the least that reading its bytes would take."""
    from ltepass.pages.plots import bars

    return bars({label(r): (r.ms, r.byte_ideal_ms) for r in records}, "ms per token", "byte ideal")


def label(record: TokenRecord) -> str:
    """A row in a few words."""
    sparse = f" {record.sparsity:.0%} sparse" if record.router else ""
    return f"{record.side} {record.format}{sparse}, {threads_of(record.threads)}"


def threads_of(n: int) -> str:
    return f"{n} thread{'s' if n > 1 else ''}"
