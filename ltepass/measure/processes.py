"""Each side of a benchmark in a process of its own: their threads, their memory and their crashes stay apart.

They work in turns, when asked. Threads of an idle one sleep: OpenMP's spin for a few milliseconds after their work,
which `REST` leaves to them.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
from torch import Tensor

from ltepass.errors import LTEError
from ltepass.measure.machine import gemm_rate
from ltepass.measure.memory import resident
from ltepass.measure.sides.side import Facts, Side
from ltepass.progress import steps

REST = 0.02  # seconds
PATIENCE = 10  # seconds that a process may take to end
T = TypeVar("T")


class Worker:
    """The process of one side."""

    def __init__(self, side: Side, *, threads: int, length: int) -> None:
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, threads, length), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, call: Callable[[Seat], T]) -> T:
        """What the call returns there: a method of Seat, or a `partial` of one.

        Raises the LTEError that was raised there; RuntimeError with the traceback of any other, or at its end.
        """
        try:
            self._pipe.send(call)
            error, answer = self._pipe.recv()
        except (EOFError, OSError) as broken:
            self._process.join(PATIENCE)
            code = self._process.exitcode
            raise RuntimeError(f"the process of {self.side.name} ended with status {code}") from broken
        if error is not None:
            raise error
        time.sleep(REST)
        found: T = answer
        return found

    def close(self) -> None:
        self._pipe.close()  # which ends it
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()


@contextmanager
def workers(sides: Sequence[Side], *, threads: int, length: int) -> Iterator[list[Worker]]:
    """One for each side, all loaded; they end with the block."""
    with ExitStack() as stack:
        opened = []
        for side in steps("loading sides", sides):
            opened.append(Worker(side, threads=threads, length=length))
            stack.callback(opened[-1].close)
            opened[-1].ask(Seat.memory)  # one loads after the other
        yield opened


def _serve(pipe: Connection, side: Side, threads: int, length: int) -> None:
    torch.set_num_threads(threads)
    seat: Seat | None = None
    while True:
        try:
            call = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            seat = seat or Seat(side, length)
            with torch.no_grad():
                pipe.send((None, call(seat)))
        except LTEError as error:
            pipe.send((error, None))
        except Exception:
            pipe.send((RuntimeError(f"in the process of {side.name}:\n{traceback.format_exc()}"), None))


class Seat:
    """A side that is open in its process, and what it can be asked."""

    def __init__(self, side: Side, length: int) -> None:
        side.imports()
        self._before, _ = resident()
        start = time.perf_counter()
        self._engine = side.open(length)
        self._load_seconds = time.perf_counter() - start

    def times(self, prompt: Tensor, tokens: Tensor) -> list[float]:
        return self._engine.times(prompt, tokens)

    def facts(self, ids: Tensor, prompt_tokens: int, blocks: Tensor) -> Facts:
        return self._engine.facts(ids, prompt_tokens, blocks)

    def read_pass(self) -> tuple[int, float]:
        return self._engine.read_pass()

    def gemm_rate(self) -> float:
        return gemm_rate()

    def load_seconds(self) -> float:
        return self._load_seconds

    def memory(self) -> tuple[int, int]:
        """Bytes above what the process held after its imports: now, and at most so far."""
        now, peak = resident()
        return now - self._before, peak - self._before
