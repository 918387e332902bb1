"""`ltepass bench ...`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ltepass.cli.output_and_errors import PASSED_ON, AsJson, Device, Model, pass_on, show
from ltepass.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Timings of a saved model.")


@app.command("op", context_settings=PASSED_ON)
def op(context: typer.Context) -> None:
    """Time the sparse op against dense and other ways to skip neurons; in a checkout. All arguments go to it."""
    pass_on(context, "ltepass bench op", "bench.op")


@app.command("model")
def model(
    folder: Model,
    text: Annotated[Path, typer.Argument(help="A text file; its first tokens are decoded.")],
    against: Annotated[str, typer.Option(help="The same weights, dense, under llama.cpp,onnxruntime.")] = "",
    formats: Annotated[str, typer.Option(help="Of the weights, comma-separated: F32,BF16,Q8_0,Q4_0,Q4_1.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, comma-separated.")] = "",
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file that is a row of its own under llama.cpp.")] = None,
    exported: Annotated[list[Path] | None, typer.Option(help="A folder that `ltepass export` made of MODEL.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Of the text, before the first timed token.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of every side.")] = 4,
    blocks: Annotated[int, typer.Option(help="Of 512 tokens, for the perplexity; 0 for weights without a sense.")] = 8,
    sparsity: Annotated[list[float] | None, typer.Option(help="Sparsity for the knob; as saved if none.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="torch.compile on every side of ours.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not in FOLDER.")] = None,
    name: Annotated[str | None, typer.Option(help="What the CSV calls it; the folder's name if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="A CSV to append to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="An SVG of the times.")] = None,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Decode speed: dense, lowered and other programs in turns, beside the time that reading their bytes would take."""
    from ltepass.commands import bench
    from ltepass.commands.bench_tables import token_tables
    from ltepass.whole_file import text_of

    options = bench.BenchOptions(
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        blocks=blocks,
        compiled=compiled,
        sparsities=tuple(sparsity or ()),
        against=tuple(filter(None, against.split(","))),
        formats=tuple(filter(None, formats.split(","))),
        threads=_numbers(threads),
        gguf=gguf,
        exported=tuple(exported or ()),
        tokenizer=tokenizer,
        name=name,
        device=device,
    )
    with redirect_stdout(sys.stderr):
        records = bench.bench(str(folder), text_of(text), out, options, plot)
    show({"rows": records} if json else token_tables(records), json=json)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError as error:
        raise ConfigError(f"--threads is {text!r}; expected numbers, as 1,2") from error
