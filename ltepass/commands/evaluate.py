"""`ltepass eval`: perplexity and sparsity of a saved model on a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import ltepass
from ltepass.commands.load import load
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.measure.quality import perplexity, sparsity_curve
from ltepass.routed.report_tables import span
from ltepass.routed.routed import state_of

if TYPE_CHECKING:
    from rich.table import Table


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
