"""`ltepass export`: a saved model as a folder that decodes by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ltepass
from ltepass.commands.load import dtype_of, load, tokenizer_of
from ltepass.routed.routed import routers_of

if TYPE_CHECKING:
    from ltepass.passes.lower.quantise_linears import Format


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """As `ltepass.export` has them, and the model's own dtype. dtypes by name, as "bfloat16"; None: as saved."""

    length: int | None = None
    linears: Format | None = None
    sparsity: float | None = None
    dtype: str | None = None
    cache_dtype: str | None = None


def export(model: str, out: Path, options: ExportOptions) -> str:
    """Writes the folder with the tokenizer in it; returns what a user may want to know."""
    loaded = load(model, dtype=dtype_of(options.dtype))
    if any(routers_of(loaded)):
        if options.sparsity is not None:
            ltepass.set_sparsity(loaded, options.sparsity)
        ltepass.set_mode(loaded, "hard")
    start = time.perf_counter()
    ltepass.export(
        loaded, out, length=options.length, linears=options.linears, cache_dtype=dtype_of(options.cache_dtype)
    )
    seconds = time.perf_counter() - start
    tokenizer_of(model).save_pretrained(out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    return f"{out}: {size:.0f} MB, exported in {seconds:.0f} s"
