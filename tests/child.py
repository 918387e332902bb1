"""The environment of a process that a test starts, and the C++ compiler that it finds there."""

import os
from pathlib import Path

from ltepass.kernels.cpu import build

ROOT = Path(__file__).resolve().parent.parent


def environment(**more: str) -> dict[str, str]:
    """This one's, where `tests` and `examples` can be imported whatever the folder it is started in."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def quick_compiler(folder: Path, log: Path | None = None) -> str:
    """For CXX: this machine's compiler, which optimises nothing: an object in half the time. log: a line a call."""
    script = folder / "quick-g++"
    note = f'echo call >> "{log}"\n' if log else ""
    script.write_text(f'#!/bin/sh\n{note}exec "{build.compiler()}" "$@" -O0\n')
    script.chmod(0o755)
    return str(script)
