"""`ltepass eval --tasks`: lm-eval's tasks on a saved model, and on dense ones beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ltepass.commands.load import load, tokenizer_of
from ltepass.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

Figures = dict[str, dict[str, object]]  # by task, by metric and filter, as lm-eval names them


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """tasks: names, groups or patterns of lm-eval; include: a folder of more; shots and limit: None takes the task's.
    against: dense models; batch: sequences at a time."""

    tasks: Sequence[str]
    against: Sequence[str] = ()
    shots: int | None = None
    limit: int | None = None
    include: Path | None = None
    batch: int = 1
    device: str = "cpu"


def evaluate_tasks(folder: str, options: TaskOptions) -> dict[str, Figures]:
    """By model, the saved one first: lm-eval's figures. Routed models compute in hard mode, as they load.

    Raises ConfigError where lm-eval is not installed or knows no such task, before a model is loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-eval ({error}); pip install 'ltepass[eval]'") from error
    if options.include is not None and not options.include.is_dir():
        raise ConfigError(f"--include is {options.include}; expected a folder of tasks")
    known = TaskManager(include_path=options.include)
    if unknown := [name for name in options.tasks if not known.match_tasks([name])]:
        raise ConfigError(
            f"lm-eval has no task {unknown[0]!r}; expected some of those that `lm-eval ls tasks` shows, or of --include"
        )
    found: dict[str, Figures] = {}
    for name in (folder, *options.against):
        tokenizer = tokenizer_of(name)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {name} has no eos token, at which lm-eval ends answers; set eos_token in its "
                "tokenizer_config.json"
            )
        model = HFLM(pretrained=load(name, options.device), tokenizer=tokenizer, batch_size=options.batch)
        results = simple_evaluate(
            model=model,
            tasks=list(options.tasks),
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=known,
            log_samples=False,
        )
        found[name] = {task: dict(figures) for task, figures in results["results"].items()}
    return found


def task_table(found: Mapping[str, Figures]) -> Table:
    """A row a task and metric, a column a model; after ± what lm-eval says of the error."""
    from rich.table import Table
    from rich.text import Text

    table = Table("task", "metric")
    for name in found:
        table.add_column(Text(name), overflow="fold")
    for task, figures in next(iter(found.values())).items():
        for metric in sorted(name for name, value in figures.items() if isinstance(value, float)):
            if "_stderr" in metric:
                continue
            cells = (_cell(model[task], metric) for model in found.values())
            table.add_row(Text(task), Text(metric.removesuffix(",none")), *cells)
    return table


def _cell(figures: Mapping[str, object], metric: str) -> str:
    name, _, filtered = metric.partition(",")
    value, error = figures.get(metric), figures.get(f"{name}_stderr,{filtered}")
    shown = f"{value:.4f}" if isinstance(value, float) else "-"
    return f"{shown} ± {error:.4f}" if isinstance(error, float) else shown
