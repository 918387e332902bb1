"""How far a long step is, for whoever listens: the command line shows it, and a caller of the library hears nothing.

A step is told by its name, how many of its parts are done, and of how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Listener = Callable[[str, int, int], None]
T = TypeVar("T")

_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell the steps of a block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(what: str, done: int, total: int) -> None:
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)


def steps(what: str, items: Iterable[T]) -> Iterator[T]:
    """The items, told as each is done with; none of them where nobody knows how many there are. A loop that is left
    early is told as done."""
    total = len(items) if isinstance(items, Sized) else 0
    if total < 2:
        yield from items
        return
    try:
        tell(what, 0, total)
        for done, item in enumerate(items, 1):
            yield item
            tell(what, done, total)
    finally:
        tell(what, total, total)
