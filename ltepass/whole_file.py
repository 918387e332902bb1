"""Files as a whole: one that is written is there whole or not at all, for one step moves it to its place; one that is
read as text is UTF-8, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ltepass.errors import ConfigError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, and goes where writing it failed."""
    written = path.with_name(path.name + ".tmp")
    try:
        yield written
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def text_of(path: Path) -> str:
    """Of a UTF-8 file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); expected UTF-8; convert it, as by iconv"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; expected a text file") from error
