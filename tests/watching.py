"""What a stretch of code does to the machine, as Python's audit events say: processes, files, connections, payloads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MARK = "ltepass-payload"  # every payload of a test holds it

_PROCESS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
)
_CHANGE = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_seen: list[list[str]] = []  # one list for each `watch` that runs; an audit hook cannot be taken away again
_installed: list[bool] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _seen:
        return
    if event in (*_PROCESS, *_CHANGE, *_NETWORK) or (event == "open" and _writes(args)):
        _note(f"{event} {args!r}")
    elif event == "compile" and MARK in repr(args[0]):
        _note(f"compile of a payload: {args[0]!r}")


def _writes(args: tuple[Any, ...]) -> bool:
    path, mode, flags = args
    writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & _WRITING)
    return writes and path != os.devnull


def _note(what: str) -> None:
    for seen in _seen:
        seen.append(what)


@contextmanager
def watch() -> Iterator[list[str]]:
    """The list fills while the block runs."""
    if not _installed:
        _installed.append(True)
        sys.addaudithook(_hook)
    seen: list[str] = []
    _seen.append(seen)
    try:
        yield seen
    finally:
        _seen.remove(seen)
