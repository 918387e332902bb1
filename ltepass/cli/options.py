"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model directory, a hub name, or module:function that returns a model.")]
Folder = Annotated[Path, typer.Argument(help="A directory that save_pretrained of a transformed model wrote.")]
Out = Annotated[Path, typer.Option(help="Where results go.")]
Sparsity = Annotated[float, typer.Option(help="Share of inactive neurons, in [0, 1).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
GroupSize = Annotated[int | None, typer.Option(help="Neurons per expert; without it, chosen per site.")]
Router = Annotated[str, typer.Option(help="linear (the paper's, of groups) or proxy (of single neurons).")]
Seed = Annotated[int, typer.Option(help="Seed of grouping, router start and batches.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
# Of a command whose arguments, --help too, another program reads.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
