"""`ltepass train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ltepass.cli.output_and_errors import AsJson, Device, GroupSize, Model, Out, Router, Seed, Sparsity, say_when, show
from ltepass.grouping_methods import AUTO, GROUPINGS

METHODS = "; ".join(f"{name}: {grouping.doc}" for name, grouping in GROUPINGS.items())
EXAMPLE = "Example: ltepass train HuggingFaceTB/SmolLM2-135M my.txt --router proxy --target-sparsity 0.5"


def train(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(
            help="A file (.txt, .jsonl, .parquet), a folder of `datasets` or a hub name; its last tenth is held out."
        ),
    ],
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
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    save_every: Annotated[int, typer.Option(help="Steps from a checkpoint to the next.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on, or fail where OUT holds nothing to go on.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, whatever OUT holds.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Transform a dense model, calibrate its routers, train it, save it, and measure it.

    TEXT has rows of text, of prompt and completion, or of chat messages, as TRL reads them. The same command goes on
    after an interruption.
    """
    from contextlib import redirect_stdout

    from ltepass.commands import train as command
    from ltepass.commands.train import trained_table

    options = command.TrainOptions(
        target_sparsity=target_sparsity,
        router=router,  # type: ignore[arg-type]  # checked by LTEConfig
        group_size=group_size,
        grouping=grouping,
        steps=steps,
        batch=batch,
        length=length,
        split=split,
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
    keeping = command.Keeping(save_every=save_every, resume=resume, overwrite=overwrite)
    try:
        with redirect_stdout(sys.stderr):  # the trainer's logs; stdout is the result's
            found = command.train(model, text, out, options, keeping, say_when())
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the same command goes on from the last checkpoint in {out}", err=True)
        raise typer.Exit(130) from None
    show(found if json else trained_table(found), json=json)
