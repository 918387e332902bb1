"""What commands share: options, what they print, and errors that a user can put right as text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from ltepass.cli.progress_bars import progress_bars
from ltepass.errors import LTEError, first_line

Model = Annotated[
    str, typer.Argument(help="A model directory, a hub name, a GGUF file, or module:function that returns a model.")
]
Folder = Annotated[Path, typer.Argument(help="A directory that save_pretrained of a transformed model wrote.")]
Out = Annotated[Path, typer.Option(help="Where results go.")]
Sparsity = Annotated[float, typer.Option(help="Share of inactive neurons, in [0, 1).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
GroupSize = Annotated[int | None, typer.Option(help="Neurons per expert; without it, chosen per site.")]
Router = Annotated[str, typer.Option(help="linear (the paper's, of groups) or proxy (of single neurons).")]
Seed = Annotated[int, typer.Option(help="Seed of grouping, router start and batches.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs; all else on stderr.")]
# Of a command whose arguments, --help too, another program reads.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def pass_on(context: typer.Context, command: str, module: str) -> None:
    """A command whose arguments go to an example, and that ends as the example ends."""
    from ltepass.commands.workshop import run_example

    raise typer.Exit(run_example(command, module, context.args))


def show(what: object, *, json: bool = False) -> None:
    """A table, or anything that rich prints; as JSON: a mapping or a dataclass."""
    if json:
        typer.echo(dumps(_plain(what), default=str, allow_nan=False))
        return
    from rich.console import Console

    Console().print(what)


def _plain(value: object) -> object:
    """As JSON has it, which knows no NaN and no infinity: such a number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def say_when() -> Callable[[str], None]:
    """What a long command says of its steps, on stderr, with the seconds since it began."""
    start = time.perf_counter()
    return lambda text: typer.echo(f"{time.perf_counter() - start:6.0f} s  {text}", err=True)


def run(program: typer.Typer) -> None:
    """Errors that a user can put right are shown as text, without a traceback."""
    try:
        with progress_bars():
            program()
    except LTEError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:  # a folder that cannot be written, a disk that is full
        typer.echo(f"{type(error).__name__}: {first_line(error)}", err=True)
        raise SystemExit(2) from None
