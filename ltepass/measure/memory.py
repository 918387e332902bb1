"""Memory of this process: what it holds, and the most that it ever held."""

from __future__ import annotations

import sys
from pathlib import Path


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: now, and at most so far; both the latter where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak_of_the_system(), _peak_of_the_system()
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return 1024 * int(kilobytes["VmRSS"]), 1024 * int(kilobytes["VmHWM"])


def peak_memory() -> int:
    """Most bytes that this process ever held in memory."""
    return resident()[1]


def _peak_of_the_system() -> int:
    """On Linux it begins with what the parent held when it started this process."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
