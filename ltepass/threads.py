"""What keeps threads apart, and how many compute.

Tracing is done by one thread at a time, and so is every public call on a model: the second waits. A forward of another
thread goes on meanwhile, except where the call gives the routers another mode or other code for a time: it would
compute what nobody asked for, and is refused. `set_sparsity` and `set_mode` refuse nothing: each FFN of a forward takes
what was set before or after.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol, TextIO
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ltepass.errors import ConcurrencyError


class Shared(Protocol):
    """A router, which all threads that call its model share. thread: whose call has it to itself; turns: such calls."""

    thread: int | None
    turns: int


class Locks:
    """All locks of the library, made anew in a forked child: there, who held one is gone and will never release it."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        self.tracing = threading.RLock()
        self.classes = threading.Lock()  # of the table of generated classes
        self.hooks = threading.Lock()  # while an inline site's hooks are put back
        self.models: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # a model -> its own
        self.table = threading.Lock()  # of the models

    def of(self, model: nn.Module) -> threading.RLock:
        with self.table:
            return self.models.setdefault(model, threading.RLock())


locks = Locks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=locks.renew)


@contextmanager
def unshared(routers: Iterable[Shared]) -> Iterator[None]:
    """Until the end, a forward of another thread through one of these routers raises ConcurrencyError."""
    free = [router for router in routers if router.thread is None]
    for router in free:
        router.thread, router.turns = threading.get_ident(), router.turns + 1
    try:
        yield
    finally:
        for router in free:
            router.thread = None


def require_own(router: Shared) -> None:
    """Raises ConcurrencyError while a call of another thread has the router to itself.

    Not in a graph of Dynamo's, nor in a backward pass: checkpoints run forwards in there, in autograd's own threads.
    """
    if torch.compiler.is_compiling():  # first, so that no graph is guarded by who calls
        return
    thread = router.thread  # once: that call may end meanwhile
    if thread is not None and thread != threading.get_ident() and torch._C._current_graph_task_id() == -1:
        raise interfered()


def interfered() -> ConcurrencyError:
    return ConcurrencyError(
        "another thread is calibrating, measuring or lowering this model, whose gates do not decide as usual "
        "meanwhile; expected one thread at a time; call the model again when that call has returned, or give each "
        "thread its own copy (copy.deepcopy)"
    )


@contextmanager
def tracing() -> Iterator[None]:
    """FX and export patch torch's own modules while they trace, so that two tracers would restore each other's patches.

    Dynamo traces under a lock of its own, which is taken too where Dynamo is there at all.
    """
    with locks.tracing:
        dynamo = sys.modules.get("torch._dynamo.convert_frame")
        lock = nullcontext() if dynamo is None else dynamo.compile_lock
        with lock:
            yield


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """What this thread writes to sys.stderr is dropped; other threads write on."""
    before = sys.stderr
    ours = _OthersOnly(before)
    sys.stderr = ours
    try:
        yield
    finally:
        if sys.stderr is ours:
            sys.stderr = before


@contextmanager
def one_thread() -> Iterator[None]:
    """For a solve and for sums over many rows, which libraries cut by the number of threads on some machines.

    4,096 unknowns are solved in a second so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _OthersOnly:
    """A stream without what the thread that made this writes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.thread else self.stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)
