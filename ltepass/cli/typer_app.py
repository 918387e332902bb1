"""`ltepass ...`: each command is a thin call of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ltepass.cli import bench
from ltepass.cli.options import PASSED_ON, Device, Folder, GroupSize, Model, Out, Router, Seed, Sparsity
from ltepass.cli.output_and_errors import pass_on, run, show
from ltepass.errors import ConfigError
from ltepass.grouping_methods import AUTO, GROUPINGS

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make a transformer decoder learn to be efficient.")
app.add_typer(bench.app, name="bench")
METHODS = "; ".join(f"{name}: {grouping.doc}" for name, grouping in GROUPINGS.items())


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="smollm2, or tiny to try the demo itself in a minute.")] = "smollm2",
    target_sparsity: Sparsity = 0.5,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each training.")] = None,
    router: Router = "proxy",
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("lte-demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over where OUT holds a run.")] = False,
) -> None:
    """A real model gets faster: train, lower, time, save, load, and one table of what came out."""
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

    from ltepass.commands.inspect import inspect_model
    from ltepass.measure.memory import peak_memory

    start = time.perf_counter()
    show(inspect_model(model, group_size=group_size))
    typer.echo(f"found in {time.perf_counter() - start:.1f} s; peak memory of the process {peak_memory() / 1e9:.2f} GB")


@app.command(context_settings=PASSED_ON)
def coverage(context: typer.Context) -> None:
    """Transform, gate and lower a tiny model of every architecture; in a checkout. All arguments go to it."""
    pass_on(context, "ltepass coverage", "coverage.census")


@app.command()
def report(folder: Folder) -> None:
    """Show the sites of a saved model."""
    import ltepass
    from ltepass.commands.load import load

    show(ltepass.report(load(str(folder))))


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
    show(command.train(model, text.read_text(), out, options))


@app.command("eval")
def evaluate(
    folder: Folder,
    text: Annotated[Path, typer.Argument(help="A text file that the model was not trained on.")],
    others: Annotated[list[Path] | None, typer.Option("--text", help="More texts, a column each.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A dense model to compare with; of several, the best on each text.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of one block.")] = 512,
    limit: Annotated[int, typer.Option(help="At most so many blocks; 64 of 512 tokens for narrow intervals.")] = 16,
    sparsities: Annotated[str, typer.Option(help="Others, comma-separated: this checkpoint's curve.")] = "",
    continuations: Annotated[int, typer.Option(help="Greedy ones, for the share of 4-grams that they repeat.")] = 0,
    device: Device = "cpu",
) -> None:
    """Perplexity and sparsity of a saved model on texts, and what it costs over dense models."""
    from ltepass.commands import evaluate as command

    options = command.EvalOptions(
        sparsities=[float(s) for s in sparsities.split(",") if s],
        against=against or (),
        length=length,
        limit=limit,
        continuations=continuations,
        device=device,
    )
    show(command.evaluate(str(folder), {str(path): path.read_text() for path in (text, *(others or ()))}, options))


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 64,
    sparsity: Annotated[float | None, typer.Option(help="Another sparsity, from the calibrated table.")] = None,
    exported: Annotated[
        bool, typer.Option("--exported", help="FOLDER is one of `ltepass export`: run the code in it.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Continue a prompt with a saved model, lowered."""
    from ltepass.commands import generate as command

    continued = command.generate(
        str(folder), prompt, new_tokens=new_tokens, sparsity=sparsity, device=device, exported=exported
    )
    typer.echo(continued)


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


def main() -> None:
    run(app)
