"""Loads the C++ kernel on the first CPU call: the object that a wheel brought along, else this machine's own.

That one lies in the cache, built where it is not there yet or is no good. Where nothing loads, a warning says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import warnings
from pathlib import Path
from typing import IO

import torch

from ltepass import cache
from ltepass.errors import CacheError
from ltepass.kernels.cpu import build
from ltepass.kernels.cpu.build import UnavailableError

_lock = threading.Lock()
_loaded: bool | None = None  # None before the first try


def loaded() -> bool:
    """Whether this process has the kernel, and may have run it."""
    return bool(_loaded)


def object_path() -> Path:
    """The object that `load` has loaded, or would."""
    return _prebuilt() or cache.root() / build.object_name(build.isa())


def load() -> bool:
    """Loads the kernel, building it where needed; True once it is registered. Tries once per process."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                try:
                    _loaded = _load_prebuilt() or _load_built()
                except Warning:  # where warnings are errors, one is enough
                    _loaded = False
                    raise
    return _loaded


def _prebuilt() -> Path | None:
    """The object that a wheel brought along, where it fits source and machine."""
    path = build.HERE / "prebuilt" / build.prebuilt_name(build.isa())
    return path if path.exists() else None


def _load_prebuilt() -> bool:
    try:
        path = _prebuilt()
        if path is not None:
            with path.open("rb") as file:
                _load(file)
    except (OSError, UnavailableError):  # linked with the OpenMP of another build of torch: this machine builds its own
        return False
    return path is not None


def _load_built() -> bool:
    """Loads the object of this machine's cache, built where it is not there yet or is no good; else a warning."""
    try:
        _load_or_build()
    except (CacheError, UnavailableError) as error:
        return _warn(str(error))
    except OSError as error:
        return _warn(f"the cache cannot be used ({error}); set LTEPASS_CACHE_DIR to a folder that can be")
    return True


def _load_or_build() -> None:
    folder = cache.root()
    cache.private(folder)
    target = folder / build.object_name(build.isa())
    if _why_not(target) is None:
        return
    with cache.one_at_a_time(folder, build.BUILD_SECONDS):
        if _why_not(target) is None:  # another process has built it meanwhile
            return
        build.build(build.isa(), target)
        if reason := _why_not(target):
            raise UnavailableError(
                f"the object that was just built cannot be loaded ({reason}); set LTEPASS_CACHE_DIR to a folder where "
                f"programs may run, or CXX to another compiler; {build.KNOWN_TO_WORK}"
            )


def _why_not(path: Path) -> Exception | None:
    """Loads an object of the cache; what is wrong with it, or None."""
    try:
        with cache.opened(path) as file:
            _load(file)
    except (CacheError, OSError) as error:
        return error
    return None


def _load(file: IO[bytes]) -> None:
    """Loads a whole object and sees that it is our kernel; OSError."""
    whole = file.read()
    if hashlib.sha256(whole[: -build.DIGEST]).digest() != whole[-build.DIGEST :]:
        raise OSError(f"{file.name} was cut short or changed")
    through = Path(f"/proc/self/fd/{file.fileno()}")  # the file that was read, whatever has its name by now
    ctypes.CDLL(str(through) if through.exists() else file.name)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("ltepass::routed_ffn", "CPU"):
        raise OSError(f"{file.name} holds no kernel")


def _warn(reason: str) -> bool:
    warnings.warn(
        f"ltepass computes sparse FFNs on the CPU in plain PyTorch (exact, not faster than dense): {reason}",
        UserWarning,
        stacklevel=2,
    )
    return False


def _one_thread() -> None:
    """A forked child inherits OpenMP's notion of a pool and none of its threads: the next parallel loop would wait for
    them for ever, in our kernel as in torch's own.
    """
    if loaded():
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
