"""What a measurement was made on: its CPU, its caches and memory, and how fast it reads and computes."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def machine() -> str:
    """In a line, for a row of a table: CPU, its cores, and what torch uses of it."""
    return f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def facts() -> dict[str, str | int | None]:
    """The machine by name: CPU, GPU, cores, threads, system and versions."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The CPU's name as /proc/cpuinfo tells it, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes of the largest cache of cpu0; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes, default=32 << 20)


def gemm_rate(size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations/s of torch.mm on square fp32 matrices with torch's current thread count."""
    a, seconds = torch.ones(size, size), []
    for _ in range(repeats):
        t0 = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - t0)
    return 2 * size**3 / sorted(seconds)[repeats // 2]


def plain_reads() -> tuple[dict[str, Callable[[int], object]], int]:
    """Two ways to read cold memory once, a sum and a matrix-vector product, and the bytes of either: four times the
    last-level cache."""
    rows = 4 * last_level_cache() // 4 // 4096
    matrix, x = torch.ones(rows, 4096), torch.ones(4096)
    return {"sum": lambda _: matrix.sum(), "product": lambda _: torch.mv(matrix, x)}, matrix.nbytes
