"""The cache folder: where it is, and who may write there. Objects that run are loaded from it, so only we may."""

from __future__ import annotations

import os
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ltepass.errors import CacheError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def root() -> Path:
    """LTEPASS_CACHE_DIR, or ~/.cache/ltepass. LTEPASS_CACHE, its name in older versions, is read with a warning."""
    if chosen := os.environ.get("LTEPASS_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("LTEPASS_CACHE"):
        warnings.warn("LTEPASS_CACHE is read for now; set LTEPASS_CACHE_DIR instead", FutureWarning, stacklevel=2)
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "ltepass"
    except RuntimeError as error:  # no HOME, and a user id without an entry in passwd: many containers
        raise CacheError(f"there is no home folder ({error}); set LTEPASS_CACHE_DIR to a folder of yours") from error


def make(folder: Path) -> None:
    """Makes the folder and its missing parents, each for its owner alone, whatever the umask; OSError."""
    if folder.is_dir():
        return
    make(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another process was quicker, or a file is in the way
        if not folder.is_dir():
            raise
    else:
        folder.chmod(0o700)


def private(folder: Path) -> None:
    """Makes the folder, or sees to it that nobody but its owner, us or root, can write there; CacheError, OSError."""
    make(folder)
    if os.name != "posix":  # elsewhere a user's folders are closed to others by other means
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # what is checked and changed is one folder, not one name
    try:
        _close_to_others(folder, handle)
    finally:
        os.close(handle)


def _close_to_others(folder: Path, handle: int) -> None:
    seen, advice = os.fstat(handle), "set LTEPASS_CACHE_DIR to a folder of yours that nobody else can write to"
    if seen.st_uid not in (os.geteuid(), 0):
        raise CacheError(f"the cache {folder} belongs to user {seen.st_uid}, who could change what runs; {advice}")
    if not seen.st_mode & OTHERS_WRITE:
        return
    if seen.st_uid == os.geteuid() and not seen.st_mode & stat.S_ISVTX:  # as /tmp has it: meant to be shared
        os.fchmod(handle, 0o700)
    if os.fstat(handle).st_mode & OTHERS_WRITE:  # shared, root's, or on a file system that keeps no modes
        raise CacheError(f"others may write to the cache {folder}; {advice}")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file that only we, or root, can have written; CacheError, OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode):  # opening a pipe would wait for its writer
            raise CacheError(f"{path} is not a plain file")
        if os.name == "posix" and (seen.st_uid not in (os.geteuid(), 0) or seen.st_mode & OTHERS_WRITE):
            raise CacheError(f"{path} can be written by others")
        yield file


@contextmanager
def one_at_a_time(folder: Path, seconds: float) -> Iterator[None]:
    """Processes take turns; one that waited this long, or cannot lock files here, goes on beside the others."""
    with open(folder / "lock", "w") as handle:
        _lock(handle, time.monotonic() + seconds)
        yield


def _lock(handle: IO[str], end: float) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    while time.monotonic() < end:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
