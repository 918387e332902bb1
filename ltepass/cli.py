"""`ltepass ...`: each command is a thin call of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ltepass.errors import ConfigError, LTEError
from ltepass.grouping_methods import AUTO, GROUPINGS

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make a transformer decoder learn to be efficient.")
bench_app = typer.Typer(no_args_is_help=True, help="Timings of a saved model.")
app.add_typer(bench_app, name="bench")

Model = Annotated[str, typer.Argument(help="A model directory, a hub name, or module:function that returns a model.")]
Folder = Annotated[Path, typer.Argument(help="A directory that save_pretrained of a transformed model wrote.")]
Out = Annotated[Path, typer.Option(help="Where results go.")]
Sparsity = Annotated[float, typer.Option(help="Share of inactive neurons, in [0, 1).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
GroupSize = Annotated[int | None, typer.Option(help="Neurons per expert; without it, chosen per site.")]
Router = Annotated[str, typer.Option(help="linear (the paper's, of groups) or proxy (of single neurons).")]
METHODS = "; ".join(f"{name}: {grouping.doc}" for name, grouping in GROUPINGS.items())
Seed = Annotated[int, typer.Option(help="Seed of grouping, router start and batches.")]
# Of a command whose arguments, --help too, another program reads.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="smollm2, or tiny to try the demo itself in a minute.")] = "smollm2",
    target_sparsity: Sparsity = 0.5,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each training.")] = None,
    router: Router = "linear",
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("lte-demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over where OUT holds a run.")] = False,
) -> None:
    """A real model gets faster: train, lower, time, save, load, and one table of what came out."""
    from ltepass.demo.folder import DemoOptions
    from ltepass.demo.run import run_demo

    options = DemoOptions(
        model=model,  # type: ignore[arg-type]  # both are checked by DemoOptions
        target_sparsity=target_sparsity,
        steps=steps,
        router=router,  # type: ignore[arg-type]
        seed=seed,
        device=device,
    )
    try:
        run_demo(options, out, fresh=fresh)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what is finished lies in {out}; the same command goes on from there", err=True)
        raise typer.Exit(130) from None


@app.command()
def inspect(
    model: Model,
    group_size: GroupSize = None,
) -> None:
    """Show the FFN sites that transform would find, and why other candidates are refused. Needs no weights."""
    import time

    from ltepass.commands.inspect import inspect_model, peak_memory

    start = time.perf_counter()
    _print(inspect_model(model, group_size=group_size))
    typer.echo(f"found in {time.perf_counter() - start:.1f} s; peak memory of the process {peak_memory() / 1e9:.2f} GB")


@app.command(context_settings=PASSED_ON)
def coverage(context: typer.Context) -> None:
    """Transform, gate and lower a tiny model of every architecture; in a checkout. All arguments go to it."""
    _example(context, "ltepass coverage", "coverage.census")


@app.command()
def report(folder: Folder) -> None:
    """Show the sites of a saved model."""
    import ltepass
    from ltepass.commands.load import load

    _print(ltepass.report(load(str(folder))))


@app.command()
def train(
    model: Model,
    text: Annotated[Path, typer.Argument(help="A text file; its last tenth is held out.")],
    out: Out = Path("lte-model"),
    target_sparsity: Sparsity = 0.5,
    router: Router = "linear",
    group_size: GroupSize = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of the hard stage; 0: none.")] = 100,
    batch: Annotated[int, typer.Option(help="Blocks of one step.")] = 4,
    grouping: Annotated[str, typer.Option(help=f"Which neurons make an expert. {METHODS}.")] = AUTO,
    length: Annotated[int, typer.Option(help="Tokens of one block.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Of both stages.")] = 1e-4,
    soft_steps: Annotated[int, typer.Option(help="Of the paper's soft stage before it; for long trainings.")] = 0,
    warm_start: Annotated[bool, typer.Option(help="Refit each FFN before the first step.")] = True,
    trainable: Annotated[str, typer.Option(help="all, lora (on the FFNs) or routers.")] = "all",
    straight_through: Annotated[bool, typer.Option("--straight-through", help="Routers learn in both stages.")] = False,
    distill: Annotated[float, typer.Option(help="Weight of the KL to the dense model, instead of labels.")] = 0.0,
    union: Annotated[float, typer.Option(help="Coefficient by which neighbouring tokens share experts.")] = 0.0,
    budget: Annotated[str, typer.Option(help="layer (each meets the target) or model (their mean).")] = "layer",
    hidden_sparsity: Annotated[
        float, typer.Option(help="Share of active neurons that the down projection leaves out too.")
    ] = 0.0,
    input_sparsity: Annotated[
        float, typer.Option(help="Share of an FFN's inputs that its up and gate projections leave out.")
    ] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Transform a dense model, calibrate its routers and train it on a text, and save it."""
    from ltepass.commands import train as command

    options = command.TrainOptions(
        target_sparsity=target_sparsity,
        router=router,  # type: ignore[arg-type]  # checked by LTEConfig
        group_size=group_size,
        grouping=grouping,
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        soft_steps=soft_steps,
        warm_start=warm_start,
        budget=budget,  # type: ignore[arg-type]  # checked by LTEConfig
        hidden_sparsity=hidden_sparsity,
        input_sparsity=input_sparsity,
        stages={
            "trainable": trainable,
            "straight_through": straight_through,
            "distill": distill,
            "union": union,
        },
    )
    _print(command.train(model, text.read_text(), out, options))


@app.command("eval")
def evaluate(
    folder: Folder,
    text: Annotated[Path, typer.Argument(help="A text file that the model was not trained on.")],
    length: Annotated[int, typer.Option(help="Tokens of one block.")] = 512,
    limit: Annotated[int, typer.Option(help="At most so many blocks.")] = 16,
    sparsities: Annotated[str, typer.Option(help="Others, comma-separated: this checkpoint's curve.")] = "",
    device: Device = "cpu",
) -> None:
    """Perplexity of a saved model on a text, with its gates and without, and how sparse it is there."""
    from ltepass.commands import evaluate as command

    wanted = [float(s) for s in sparsities.split(",") if s]
    _print(command.evaluate(str(folder), text.read_text(), wanted, length=length, limit=limit, device=device))


@bench_app.command("op", context_settings=PASSED_ON)
def bench_op(context: typer.Context) -> None:
    """Time the sparse op against dense and other ways to skip neurons; in a checkout. All arguments go to it."""
    _example(context, "ltepass bench op", "bench.op")


@bench_app.command("model")
def bench_model(
    folder: Model,
    text: Annotated[Path, typer.Argument(help="A text file; its first tokens are decoded.")],
    against: Annotated[str | None, typer.Option(help="llama.cpp: the same weights, dense, in each format.")] = None,
    formats: Annotated[str, typer.Option(help="Of the weights, comma-separated: F32,BF16,Q8_0,Q4_0,Q4_1.")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, comma-separated.")] = "",
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file that is a row of its own under llama.cpp.")] = None,
    exported: Annotated[list[Path] | None, typer.Option(help="A folder that `ltepass export` made of MODEL.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds of every side.")] = 4,
    sparsity: Annotated[list[float] | None, typer.Option(help="Sparsity for the knob; as saved if none.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="torch.compile on every side of ours.")] = False,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not in FOLDER.")] = None,
    name: Annotated[str | None, typer.Option(help="What the CSV calls it; the folder's name if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="A CSV to append to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="An SVG of the times.")] = None,
    device: Device = "cpu",
) -> None:
    """Decode speed: dense, lowered and llama.cpp take turns, beside the time that reading their bytes would take."""
    from ltepass.commands import bench

    options = bench.BenchOptions(
        tokens=tokens,
        rounds=rounds,
        compiled=compiled,
        sparsities=tuple(sparsity or ()),
        against=against,
        formats=tuple(filter(None, formats.split(","))),
        threads=_numbers(threads),
        gguf=gguf,
        exported=tuple(exported or ()),
        tokenizer=tokenizer,
        name=name,
        device=device,
    )
    _print(bench.bench(str(folder), text.read_text(), out, options, plot))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError as error:
        raise ConfigError(f"--threads is {text!r}; expected numbers, as 1,2") from error


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 64,
    sparsity: Annotated[float | None, typer.Option(help="Another sparsity, from the calibrated table.")] = None,
    device: Device = "cpu",
) -> None:
    """Continue a prompt with a saved model, lowered."""
    from ltepass.commands import generate as command

    typer.echo(command.generate(str(folder), prompt, new_tokens=new_tokens, sparsity=sparsity, device=device))


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    length: Annotated[int | None, typer.Option(help="Tokens that the cache holds; at most 2048 if none.")] = None,
    linears: Annotated[str | None, typer.Option(help="int8, int4 or int4_minimum; as they are if none.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Another sparsity, from the calibrated table.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as saved if none.")] = None,
    cache_dtype: Annotated[str | None, typer.Option(help="The same, of keys and values.")] = None,
) -> None:
    """Write a folder that decodes by itself, sparse or dense: compiled graphs, weights, kernels and the tokenizer."""
    from ltepass.commands import export as command

    options = command.ExportOptions(
        length=length,
        linears=linears,  # type: ignore[arg-type]  # checked by ltepass.export
        sparsity=sparsity,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    typer.echo(command.export(model, out, options))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """`transformers serve` for saved models, lowered as they load; all arguments go to it."""
    try:
        from transformers.cli.transformers import app as transformers_app

        from ltepass.serving.lowered_server import lowered_as_loaded
        from ltepass.serving.middleware import checked_server
    except ImportError as error:
        raise ConfigError(f"transformers' server cannot start ({error}); pip install 'ltepass[serve]'") from error
    with checked_server(), lowered_as_loaded():
        transformers_app(["serve", *context.args])


def _example(context: typer.Context, command: str, module: str) -> None:
    from ltepass.commands.workshop import run_example

    raise typer.Exit(run_example(command, module, context.args))


def _print(what: object) -> None:
    from rich.console import Console

    Console().print(what)


def run_command(function: Callable[..., None]) -> None:
    """One function as a program of its own, with its options and errors shown as those of `ltepass`."""
    program = typer.Typer(add_completion=False)
    program.command()(function)
    _run(program)


def main() -> None:
    _run(app)


def _run(program: typer.Typer) -> None:
    """Errors that a user can put right are shown as text, without a traceback."""
    try:
        program()
    except LTEError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from None
