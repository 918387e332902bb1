"""`ltepass ...`: each command is a thin call of the library."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ltepass.cli import bench, evaluate, train
from ltepass.cli.output_and_errors import (
    PASSED_ON,
    AsJson,
    Device,
    Folder,
    GroupSize,
    Model,
    Out,
    Router,
    Seed,
    Sparsity,
    pass_on,
    run,
    show,
)
from ltepass.errors import ConfigError
from ltepass.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(bench.app, name="bench")
app.command(epilog=train.EXAMPLE)(train.train)
app.command("eval", epilog=evaluate.EXAMPLE)(evaluate.evaluate)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ltepass {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Make a transformer decoder learn to be efficient."""


@app.command(epilog="Example: ltepass demo --model tiny")
def demo(
    model: Annotated[str, typer.Option(help="smollm2, or tiny to try the demo itself in a minute.")] = "smollm2",
    target_sparsity: Sparsity = 0.5,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each training.")] = None,
    router: Router = "proxy",
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("lte-demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over where OUT holds a run.")] = False,
    json: AsJson = False,
) -> None:
    """A real model gets faster: train, lower, time, save, load, and one table of what came out."""
    from rich.console import Console

    from ltepass.commands.load import require_device
    from ltepass.demo.options import DemoOptions
    from ltepass.demo.run import run_demo

    options = DemoOptions(
        model=model,  # type: ignore[arg-type]  # both are checked by DemoOptions
        target_sparsity=target_sparsity,
        steps=steps,
        router=router,  # type: ignore[arg-type]
        seed=seed,
        device=device,
    )
    require_device(device)
    try:
        with redirect_stdout(sys.stderr if json else sys.stdout):
            results = run_demo(options, out, fresh=fresh, console=Console(stderr=json))
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what is finished lies in {out}; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if json:
        show(results, json=True)


@app.command(epilog="Example: ltepass inspect HuggingFaceTB/SmolLM2-135M")
def inspect(
    model: Model,
    group_size: GroupSize = None,
    match: Annotated[str, typer.Option(help="ffn, or mlp: also what is not as wide where it ends.")] = "ffn",
    json: AsJson = False,
) -> None:
    """Show the FFN sites that transform would find, and why other candidates are refused. Needs no weights."""

    from ltepass.commands.inspect import inspect_model
    from ltepass.measure.memory import peak_memory

    start = time.perf_counter()
    show(inspect_model(model, group_size=group_size, match=match), json=json)
    took = f"found in {time.perf_counter() - start:.1f} s; peak memory of the process {peak_memory() / 1e9:.2f} GB"
    typer.echo(took, err=True)


@app.command(context_settings=PASSED_ON)
def coverage(context: typer.Context) -> None:
    """Transform, gate and lower a tiny model of every architecture; in a checkout. All arguments go to it."""
    pass_on(context, "ltepass coverage", "coverage.census")


@app.command(epilog="Example: ltepass report lte-model --html report.html --text other.txt --sparsities 0.3,0.5,0.7")
def report(
    folder: Folder,
    html: Annotated[Path | None, typer.Option(help="A page to write: one file, no script.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file, to measure scores, use and sparsity on.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of one block.")] = 512,
    limit: Annotated[int, typer.Option(help="At most so many blocks.")] = 16,
    sparsities: Annotated[str, typer.Option(help="Comma-separated: the page's frontier, on the text.")] = "",
    training: Annotated[Path | None, typer.Option(help="Where a training wrote, if not FOLDER.")] = None,
    bench: Annotated[Path | None, typer.Option(help="Rows of `ltepass bench model --out`, for the page.")] = None,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Show the sites of a saved model, and write a page of what was found and measured."""
    from ltepass.commands import report as command

    options = command.ReportOptions(
        text=text,
        length=length,
        limit=limit,
        sparsities=[float(s) for s in sparsities.split(",") if s],
        training=training,
        bench=bench,
        device=device,
    )
    show(command.report(str(folder), options, html), json=json)
    if html is not None:
        typer.echo(f"page: {html}", err=True)


@app.command(epilog='Example: ltepass generate lte-model "Once upon a time" --new-tokens 32')
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 64,
    sparsity: Annotated[float | None, typer.Option(help="Another sparsity, from the calibrated table.")] = None,
    exported: Annotated[
        bool, typer.Option("--exported", help="FOLDER is one of `ltepass export`: run the code in it.")
    ] = False,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Continue a prompt with a saved model, lowered."""
    from ltepass.commands import generate as command

    continued = command.generate(
        str(folder), prompt, new_tokens=new_tokens, sparsity=sparsity, device=device, exported=exported
    )
    show({"text": continued}, json=True) if json else typer.echo(continued)


@app.command(epilog="Example: ltepass export lte-model lte-exported --linears int8")
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    length: Annotated[int | None, typer.Option(help="Tokens that the cache holds; at most 2048 if none.")] = None,
    linears: Annotated[
        str | None, typer.Option(help="int8, int4, int4_minimum (Q4_1), gguf (as in the file), or as they are.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Another sparsity, from the calibrated table.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as saved if none.")] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="The same, of keys and values.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="For int4 by GPTQ: a file of 512 tokens or more."),
    ] = None,
    shortlist: Annotated[
        int | None, typer.Option(help="Rows of an int8 head in 8 bits, the best by a 4-bit scan; all if none.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write a folder that decodes by itself, sparse or dense: compiled graphs, weights, kernels and the tokenizer."""
    from ltepass.commands import export as command

    options = command.ExportOptions(
        length=length,
        linears=linears,  # type: ignore[arg-type]  # checked by ltepass.export
        sparsity=sparsity,
        dtype=dtype,
        cache_dtype=cache_dtype,
        text=text,
        shortlist=shortlist,
    )
    with redirect_stdout(sys.stderr):
        done = command.export(model, out, options)
    show(done, json=True) if json else typer.echo(command.export_line(done))


SERVE_HELP = """\
ltepass serve MODEL [OPTIONS]: transformers' server. Routed models, and dense ones in codes, are lowered as they load.
Example: ltepass serve lte-model --port 8000
It needs: pip install 'ltepass[serve]'. Below is transformers' own help."""


@app.command(context_settings=PASSED_ON)
def serve(context: typer.Context) -> None:
    """`transformers serve` for saved models, lowered as they load; all arguments go to it."""
    try:
        from transformers.cli.transformers import app as transformers_app

        from ltepass.commands.load import require_config
        from ltepass.serving.lowered_server import lowered_as_loaded
        from ltepass.serving.middleware import checked_server
    except ImportError as error:
        raise ConfigError(f"transformers' server cannot start ({error}); pip install 'ltepass[serve]'") from error
    if "--help" in context.args:
        typer.echo(SERVE_HELP)
    elif context.args and not context.args[0].startswith("-"):
        require_config(context.args[0].partition("@")[0])  # its library asks an unreachable hub for minutes
    before = signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # a server ends by Ctrl-C: click says "Aborted!"
    try:
        with checked_server(), lowered_as_loaded():
            transformers_app(["serve", *context.args], prog_name="ltepass")
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    run(app)


def run_command(function: Callable[..., None]) -> None:
    """One function as a program of its own, with its options and errors shown as those of `ltepass`."""
    program = typer.Typer(add_completion=False)
    program.command()(function)
    run(program)
