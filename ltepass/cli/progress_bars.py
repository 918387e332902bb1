"""Long steps of a command on stderr: bars with the time left; where that is no terminal, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ltepass.progress import heard_by

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SECONDS = 10.0  # between lines


@contextmanager
def progress_bars() -> Iterator[None]:
    """For the steps of a block."""
    with _Shown() as shown, heard_by(shown.hear):
        yield


class _Shown(ExitStack):
    """Bars of the steps under way; rich is imported by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.lines: dict[str, tuple[float, float]] = {}  # by step: when it began, and when its last line was

    def hear(self, what: str, done: int, total: int) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        (self._draw if console.is_terminal else self._write)(console, what, done, total)

    def _draw(self, console: Console, what: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            # No thread of its own: a command may fork.
            self.bars = self.enter_context(Progress(*columns, console=console, transient=True, auto_refresh=False))
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self.tasks[what], completed=done, refresh=True)
        if done >= total:
            self.bars.remove_task(self.tasks.pop(what))
        if not self.tasks:
            self.bars = None
            self.pop_all().close()

    def _write(self, console: Console, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began, last = self.lines.setdefault(what, (now, now))
        if done >= total:
            del self.lines[what]
        elif done and now - last >= SECONDS:
            left = (now - began) / done * (total - done)
            console.print(f"{what}: {done} of {total}, about {left:.0f} s left", markup=False, highlight=False)
            self.lines[what] = began, now
