"""`ltepass export`: a saved model as a folder that decodes by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

import ltepass
from ltepass.commands.load import dtype_of, load, tokenizer_of
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.exporting.folder import read_about
from ltepass.routed.routed import routers_of
from ltepass.whole_file import text_of

if TYPE_CHECKING:
    from ltepass.passes.lower.quantise_linears import Format

LENGTH, BLOCKS = 512, 16  # of the text that codes of 4 bits are made by


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """As `ltepass.export` has them, and the model's own dtype. dtypes by name, as "bfloat16"; None: as saved.

    text: a file that `ltepass.quantize` sees for int4; what that leaves, a tied head and the table of tokens, is int8.
    """

    length: int | None = None
    linears: Format | None = None
    sparsity: float | None = None
    dtype: str | None = None
    cache_dtype: str | None = None
    text: Path | None = None
    shortlist: int | None = None


class Exported(TypedDict):
    """bytes: of all files; token_bytes, gated_bytes: as in `exporting.folder.About`."""

    folder: str
    bytes: int
    seconds: float
    token_bytes: int
    gated_bytes: int


def export(model: str, out: Path, options: ExportOptions) -> Exported:
    """Writes the folder with the tokenizer in it; returns what a user may want to know. Raises ConfigError."""
    if options.text is not None and options.linears != "int4":
        raise ConfigError(f"a text is given, and linears are {options.linears}; expected int4 with it")
    loaded = load(model, dtype=dtype_of(options.dtype))
    if any(routers_of(loaded)):
        if options.sparsity is not None:
            ltepass.set_sparsity(loaded, options.sparsity)
        ltepass.set_mode(loaded, "hard")
    start = time.perf_counter()
    linears: Format | None = options.linears
    if options.text is not None:
        ltepass.quantize(loaded, "int4", _batches(model, options.text))
        linears = "int8"
    ltepass.export(
        loaded,
        out,
        length=options.length,
        linears=linears,
        cache_dtype=dtype_of(options.cache_dtype),
        shortlist=options.shortlist,
    )
    seconds = time.perf_counter() - start
    tokenizer_of(model).save_pretrained(out)
    about = read_about(out)
    return {
        "folder": str(out),
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "seconds": seconds,
        "token_bytes": about.token_bytes,
        "gated_bytes": about.gated_bytes,
    }


def _batches(model: str, text: Path) -> list[Tensor]:
    blocks = token_blocks(tokenizer_of(model), text_of(text), LENGTH, BLOCKS)
    if not len(blocks):
        raise ConfigError(f"{text} has no whole block of {LENGTH} tokens; pass more text")
    return list(blocks.split(4))


def export_line(done: Exported) -> str:
    return f"{done['folder']}: {done['bytes'] / 1e6:.0f} MB, exported in {done['seconds']:.0f} s"
