"""Builds and loads the C++ kernel: with g++ alone, on the first CPU call, once per source, ISA and torch version.

A wheel may carry objects built ahead (`python -m ltepass.kernels.routed_ffn_cpu DIR`, DIR = kernels/prebuilt); they go
through the stable ABI of torch 2.11, so one object serves every later torch.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCE = "routed_ffn_cpu.cpp"
HEADERS = ("simd.h", "problem.h", "decode.h", "gemm.h", "batch.h")
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that ltepass supports
# What each object may assume of the CPU, as /proc/cpuinfo names it; the first that fits is taken.
_V4 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2")
X86_LEVELS = {
    "cooperlake": (*_V4, "avx512_vnni", "avx512_bf16"),  # Sapphire Rapids and Zen 4 too: they multiply bf16
    "x86-64-v4": _V4,
    "x86-64-v3": ("avx2", "fma", "f16c", "bmi2", "movbe"),
    "x86-64": (),
}
_lock = threading.Lock()
_loaded: bool | None = None  # None before the first try


@cache
def isa() -> str:
    """The -march value for this machine: an x86-64 level, or the architecture's baseline elsewhere.

    LTEPASS_ISA overrides it (to measure or test a lower level).
    """
    if chosen := os.environ.get("LTEPASS_ISA"):
        return chosen
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return "armv8-a" if machine in ("aarch64", "arm64") else machine
    flags = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = {f for line in cpuinfo.read_text().splitlines() if line.startswith("flags") for f in line.split()}
    return next(level for level, needs in X86_LEVELS.items() if flags.issuperset(needs))


def compiler() -> str | None:
    """CXX where it is set, else g++, c++ or clang++ on the PATH; None where there is none."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def flags(march: str) -> list[str]:
    return [
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-fopenmp",
        f"-march={march}",
        f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
    ]


def cache_dir() -> Path:
    return Path(os.environ.get("LTEPASS_CACHE_DIR") or Path.home() / ".cache" / "ltepass")


def object_name(march: str) -> str:
    """Changes with the source, the flags, the ISA and the torch version, so that a stale object is never loaded."""
    return f"routed_ffn_{march}_{_digest(march, torch.__version__)}.so"


def prebuilt_name(march: str) -> str:
    """As `object_name`, for every torch version: an object in a wheel serves them all."""
    return f"routed_ffn_{march}_{_digest(march)}.so"


def _digest(march: str, *more: str) -> str:
    digest = hashlib.sha256(" ".join([*more, *flags(march)]).encode())
    for name in (SOURCE, *HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def build(march: str, target: Path) -> None:
    """Compiles to a temporary name and renames: nobody ever sees half an object. Raises CalledProcessError, OSError."""
    cxx = compiler()
    assert cxx is not None
    torch_dir = Path(torch.__file__).parent
    # torch's own OpenMP: a second one beside it would mean two pools of spinning threads.
    openmp = [str(lib) for lib in (torch_dir / "lib").glob("libgomp*.so*")]
    link = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", *openmp]
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        out = Path(tmp) / target.name
        command = [cxx, *flags(march), f"-I{torch_dir / 'include'}", str(HERE / SOURCE), "-o", str(out), *link]
        subprocess.run(command, check=True, capture_output=True, text=True)
        out.replace(target)


@contextmanager
def _only_one_process(directory: Path) -> Iterator[None]:
    with open(directory / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _built() -> Path | None:
    """The object of this machine's cache, built where it is not there yet; None where that fails."""
    target = cache_dir() / object_name(isa())
    if target.exists():
        return target
    if compiler() is None:
        _warn("no C++ compiler was found", "install g++ (apt install g++, dnf install gcc-c++) or set CXX")
        return None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_process(target.parent):
            if not target.exists():
                build(isa(), target)
    except subprocess.CalledProcessError as error:
        _warn(f"{error.cmd[0]} failed: {error.stderr[-800:]}", "a g++ of version 11 or later is known to work")
        return None
    except OSError as error:
        _warn(f"the cache cannot be written ({error})", "set LTEPASS_CACHE_DIR to a folder that can be")
        return None
    return target


def _warn(seen: str, advice: str) -> None:
    warnings.warn(
        f"ltepass computes sparse FFNs on the CPU in plain PyTorch (exact, not faster than dense): {seen}; {advice}",
        UserWarning,
        stacklevel=2,
    )


def load() -> bool:
    """Loads the kernel, building it where needed; True once it is registered. Tries once per process."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load_prebuilt() or _load_built()
    return _loaded


def _prebuilt() -> Path | None:
    """The object that a wheel brought along, where it fits source and machine."""
    path = HERE / "prebuilt" / prebuilt_name(isa())
    return path if path.exists() else None


def _load_prebuilt() -> bool:
    path = _prebuilt()
    if path is None:
        return False
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError:  # linked with the OpenMP of another build of torch: this machine builds its own
        return False
    return True


def _load_built() -> bool:
    path = _built()
    if path is not None:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return path is not None


def which_path(T: int, d_model: int, d_ff: int, n_experts: int, dtype: torch.dtype) -> str:
    """In words, what a call of T tokens does; the active share, known during the call, decides the rest."""
    if not load():
        return "masked dense (PyTorch)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"masked dense (PyTorch): no kernel for {str(dtype).removeprefix('torch.')}"
    if T == 1:
        return f"C++ {isa()}: active neurons only"
    share = torch.ops.ltepass._dense_above(torch.empty(0, dtype=dtype), T)
    dense = f", dense and mask above {share:.0%} active" if share < 1 else ""
    return f"C++ {isa()}: per expert, its own tokens{dense}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the kernel ahead of time, for a wheel.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--isa", nargs="*", default=list(X86_LEVELS) if isa() in X86_LEVELS else [isa()])
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    for march in args.isa:
        build(march, args.directory / prebuilt_name(march))
        print(args.directory / prebuilt_name(march))


if __name__ == "__main__":
    main()
