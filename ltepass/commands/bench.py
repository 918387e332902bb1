"""What `ltepass bench model` does: lists the sides, writes their files, lets them take turns and shows the rows."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ltepass.commands.bench_tables import token_plot
from ltepass.commands.load import load, tokenizer_of
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.exporting.folder import is_gated
from ltepass.measure import gguf_file, llama_cpp
from ltepass.measure.bench_tokens import PREFILL_TOKENS, PROMPT_TOKENS, Text, bench_tokens
from ltepass.measure.records import TokenRecord, append
from ltepass.measure.sides import onnxruntime_side
from ltepass.measure.sides.exported_side import Exported
from ltepass.measure.sides.llama_cpp_side import under_llama_cpp
from ltepass.measure.sides.onnxruntime_side import under_onnxruntime
from ltepass.measure.sides.side import DTYPES, Side
from ltepass.measure.sides.transformers_side import How, Quantised, Transformers
from ltepass.routed.routed import is_transformed
from ltepass.transform_and_lower import remove

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTISED: dict[str, Quantised] = {"Q8_0": "int8", "Q4_0": "int4"}  # what we have of llama.cpp's formats
PROGRAMS = LLAMA_CPP, ONNXRUNTIME = "llama.cpp", "onnxruntime"  # that one might take in our place
BLOCK, BLOCKS = 512, 8  # of the perplexity: tokens of a block, and how many


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Of `ltepass bench model`. sparsities: for the knob; none keeps the saved thresholds. against: other programs;
    formats: of the weights, there and here; none: as they were saved. gguf: a file of its own for llama.cpp. exported:
    folders that `ltepass export` made of this model. blocks: of the text, for the perplexity; 0: it is not computed.
    threads: none takes torch's. tokenizer: where it lies; name: what the CSV calls the model."""

    tokens: int = 64
    prompt_tokens: int = PROMPT_TOKENS
    rounds: int = 4
    blocks: int = BLOCKS
    compiled: bool = False
    sparsities: tuple[float, ...] = ()
    against: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    gguf: Path | None = None
    exported: tuple[Path, ...] = ()
    tokenizer: str | None = None
    name: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if odd := [program for program in self.against if program not in PROGRAMS]:
            raise ConfigError(f"--against has {odd[0]!r}; expected some of {', '.join(PROGRAMS)}")
        if LLAMA_CPP not in self.against and self.gguf is not None:
            raise ConfigError("--gguf names a file for llama.cpp; expected --against llama.cpp with it")
        if self.against and self.device != "cpu":
            raise ConfigError(f"--device is {self.device!r}; {self.against[0]} is compared on the CPU alone")
        if self.rounds < 1 or min(self.threads, default=1) < 1:
            raise ConfigError(f"--rounds is {self.rounds}, --threads {self.threads}; expected 1 or more of each")
        if self.blocks < 0:
            raise ConfigError(f"--blocks is {self.blocks}; expected 0 or more")
        known = gguf_file.FORMATS if self.against else tuple(DTYPES)
        if odd := [format for format in self.formats if format not in known]:
            raise ConfigError(f"--formats has {odd[0]!r}; expected some of {', '.join(known)}")


def bench(
    folder: str, text: str, out: Path | None, options: BenchOptions, plot: Path | None = None
) -> list[TokenRecord]:
    """The time of one token, a row a side, on the first tokens of `text`.

    The rows are appended to the CSV file `out`, those of a number of threads as soon as they are measured, and drawn
    into the SVG file `plot`. Raises ConfigError where the text
    is too short, and where another program is not installed or cannot run this model in one of the formats.
    """
    if LLAMA_CPP in options.against:
        llama_cpp.library()
    if ONNXRUNTIME in options.against:
        onnxruntime_side.library()
    read = _text(text, options.tokenizer or folder, options)
    name, threads = options.name or Path(folder).resolve().name, options.threads or (torch.get_num_threads(),)
    records: list[TokenRecord] = []
    with _sides(folder, options) as sides:
        for some in bench_tokens(sides, read, model=name, threads=threads, rounds=options.rounds):
            records += some
            if out is not None:
                append(out, some)
    if plot is not None:
        plot.write_text(token_plot(records))
    return records


def _text(text: str, tokenizer_folder: str, options: BenchOptions) -> Text:
    """The tokens that every side is timed on, and blocks for the perplexity."""
    tokenizer = tokenizer_of(tokenizer_folder)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = token_blocks(tokenizer, text, min(BLOCK, len(ids)), limit=options.blocks)
    kept = ids[: max(PREFILL_TOKENS, options.prompt_tokens + options.tokens)]
    return Text(ids=kept, tokens=options.tokens, blocks=blocks, prompt_tokens=options.prompt_tokens)


@contextmanager
def _sides(folder: str, options: BenchOptions) -> Iterator[list[Side]]:
    """All that take turns, in the order of the table. Files that they need are there until the end."""
    model = load(folder, options.device)
    routed, formats = is_transformed(model), options.formats or (_format_of(model),)
    sides: list[Side] = []
    how: How = "compiled" if options.compiled else "eager"
    for dtype in [DTYPES[format] for format in formats if format in DTYPES] or [model.dtype]:
        plain = Transformers(load=partial(load, folder, options.device, dtype), routed=False, how=how)
        sides += [plain, replace(plain, lowered=True)]
        sides += [replace(plain, routed=True, sparsity=s) for s in options.sparsities or (None,) if routed]
    if importlib.util.find_spec("torchao") is not None:  # of the extra "compare"
        single = partial(load, folder, options.device, torch.float32)
        plain = Transformers(load=single, routed=False, lowered=True, how=how)
        sides += [replace(plain, quantised=QUANTISED[format]) for format in formats if format in QUANTISED]
    saved = Transformers(load=partial(load, folder, options.device), routed=True)
    sides += [Exported(folder=path, source=saved if is_gated(path) else None) for path in options.exported]
    with tempfile.TemporaryDirectory(prefix="ltepass-bench-") as scratch:
        dense = remove(model) if routed and options.against else model
        if LLAMA_CPP in options.against:
            sides += under_llama_cpp(dense, formats, Path(scratch), options.gguf)
        if ONNXRUNTIME in options.against:
            sides += under_onnxruntime(dense, formats, options.tokenizer or folder, Path(scratch))
        del model, dense
        yield sides


def _format_of(model: PreTrainedModel) -> str:
    """Without --formats: what the tables call the dtype of the model's weights."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    if model.dtype not in names:
        raise ConfigError(f"the model's weights are {model.dtype}; expected one of {', '.join(map(str, names))}")
    return names[model.dtype]
