"""A file that is there whole or not at all: written beside its place, and moved there in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, and goes where writing it failed."""
    written = path.with_name(path.name + ".tmp")
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)
