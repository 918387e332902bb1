"""How a command ends: what it prints, and errors that a user can put right as text."""

from __future__ import annotations

from collections.abc import Callable

import typer

from ltepass.errors import LTEError


def pass_on(context: typer.Context, command: str, module: str) -> None:
    """A command whose arguments go to an example, and that ends as the example ends."""
    from ltepass.commands.workshop import run_example

    raise typer.Exit(run_example(command, module, context.args))


def show(what: object) -> None:
    from rich.console import Console

    Console().print(what)


def run_command(function: Callable[..., None]) -> None:
    """One function as a program of its own, with its options and errors shown as those of `ltepass`."""
    program = typer.Typer(add_completion=False)
    program.command()(function)
    run(program)


def run(program: typer.Typer) -> None:
    """Errors that a user can put right are shown as text, without a traceback."""
    try:
        program()
    except LTEError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(2) from None
