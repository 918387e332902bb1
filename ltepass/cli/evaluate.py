"""`ltepass eval`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from ltepass.cli.output_and_errors import AsJson, Device, Folder, show
from ltepass.errors import ConfigError

LENGTH = 512
EXAMPLE = "Example: ltepass eval lte-model other.txt --sparsities 0.3,0.5,0.7"


def evaluate(
    folder: Folder,
    text: Annotated[Path | None, typer.Argument(help="A text file that the model was not trained on.")] = None,
    others: Annotated[list[Path] | None, typer.Option("--text", help="More texts, a column each.")] = None,
    against: Annotated[
        list[str] | None, typer.Option(help="A dense model to compare with; of several, the best on each text.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of one block.")] = LENGTH,
    limit: Annotated[
        int | None,
        typer.Option(help="Blocks of a text (16 if none; 64 for narrow intervals) or questions of a task."),
    ] = None,
    sparsities: Annotated[str, typer.Option(help="Others, comma-separated: this checkpoint's curve.")] = "",
    continuations: Annotated[int, typer.Option(help="Greedy ones, for the share of 4-grams that they repeat.")] = 0,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval in place of texts, comma-separated.")] = "",
    shots: Annotated[int | None, typer.Option(help="Examples before each question of a task; its own if none.")] = None,
    include: Annotated[Path | None, typer.Option(help="A folder of more tasks, as lm-eval reads them.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a task at a time.")] = 1,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Perplexity and sparsity of a saved model on texts, or its score on tasks, and what it costs over dense models."""
    if (text is None) == (not tasks):
        raise ConfigError("expected a text, or --tasks, and not both")
    of_texts = {"--text": others, "--sparsities": sparsities, "--continuations": continuations}
    of_texts |= {"--length": length != LENGTH}
    of_tasks = {"--shots": shots is not None, "--include": include, "--batch": batch != 1}
    if odd := [name for name, given in (of_texts if tasks else of_tasks).items() if given]:
        kinds = ("a text", "--tasks") if tasks else ("--tasks", "a text")
        raise ConfigError(f"{odd[0]} was given with {kinds[1]}; expected it with {kinds[0]}, or not at all")
    with redirect_stdout(sys.stderr):
        if text is None:
            from ltepass.commands.tasks import TaskOptions, evaluate_tasks, task_table

            chosen = TaskOptions(
                tasks=list(filter(None, tasks.split(","))),
                against=against or (),
                shots=shots,
                limit=limit,
                include=include,
                batch=batch,
                device=device,
            )
            found = evaluate_tasks(str(folder), chosen)
            shown: object = found if json else task_table(found)
        else:
            from ltepass.commands import evaluate as command
            from ltepass.whole_file import text_of

            options = command.EvalOptions(
                sparsities=_shares(sparsities),
                against=against or (),
                length=length,
                limit=16 if limit is None else limit,
                continuations=continuations,
                device=device,
            )
            texts = {str(path): text_of(path) for path in (text, *(others or ()))}
            columns = command.evaluate(str(folder), texts, options)
            shown = command.eval_json(columns) if json else command.eval_table(columns)
    show(shown, json=json)


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word]
    except ValueError as error:
        raise ConfigError(f"--sparsities is {text!r}; expected numbers, as 0.3,0.5") from error
