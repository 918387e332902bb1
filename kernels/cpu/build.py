"""Builds and loads the C++ kernel: with g++ alone, on the first CPU call, once per source, ISA and torch version.

A wheel may carry objects built ahead (`python -m ltepass.kernels.cpu.build DIR`, DIR = kernels/prebuilt); they go
through the stable ABI of torch 2.11, so one object serves every later torch.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import IO

import torch

HERE = Path(__file__).resolve().parent
SOURCES = ("routed_ffn_cpu.cpp", "linear_cpu.cpp", "attention_cpu.cpp", "pool.cpp")
HEADERS = (
    "simd.h",
    "problem.h",
    "tensors.h",
    "pool.h",
    "decode.h",
    "gemm.h",
    "batch.h",
    "linear.h",
    "attention.h",
    "quantised.h",
    "read_pass.h",
    "proxy.h",
    "proxy_tensors.h",
)
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that ltepass supports
# What each object may assume of the CPU, as /proc/cpuinfo names it; the first that fits is taken.
_V4 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2")
X86_LEVELS = {
    "cooperlake": (*_V4, "avx512_vnni", "avx512_bf16"),  # Sapphire Rapids and Zen 4 too: they multiply bf16
    "cascadelake": (*_V4, "avx512_vnni"),  # Ice Lake too: sums of products of bytes
    "x86-64-v4": _V4,
    "x86-64-v3": ("avx2", "fma", "f16c", "bmi2", "movbe"),
    "x86-64": (),
}
DIGEST = hashlib.sha256().digest_size  # bytes behind an object, see `_seal`
BUILD_SECONDS = 180  # 25 on an idle core
KNOWN_TO_WORK = "a g++ of version 11 or later is known to work"
_lock = threading.Lock()
_loaded: bool | None = None  # None before the first try


class UnavailableError(Exception):
    """There is no kernel in this process: why, and what to do."""


@cache
def levels() -> tuple[str, ...]:
    """The -march values that this machine runs, best first: x86-64 levels, or the architecture's baseline elsewhere."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return ("armv8-a" if machine in ("aarch64", "arm64") else machine,)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: the baseline
        lines = []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return tuple(level for level, needs in X86_LEVELS.items() if flags.issuperset(needs))


@cache
def isa() -> str:
    """The best of `levels`, or LTEPASS_ISA, another of them (to measure or test it). Raises UnavailableError."""
    chosen = os.environ.get("LTEPASS_ISA") or levels()[0]
    if chosen not in levels():  # anything else might stop the process with an illegal instruction
        raise UnavailableError(f"LTEPASS_ISA is {chosen!r}; this machine runs {', '.join(levels())}")
    return chosen


def compile_command() -> list[str]:
    """The words of CXX where it is set ("ccache g++"), else g++, c++ or clang++; empty where it is not on the PATH."""
    chosen = os.environ.get("CXX", "").strip()
    if not chosen:
        return next(([found] for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), [])
    if whole := shutil.which(chosen):  # one program, though its path may hold spaces
        return [whole]
    try:
        program, *words = shlex.split(chosen, posix=os.name == "posix")
    except ValueError:  # a quote that is not closed
        return []
    found = shutil.which(program)
    return [found, *words] if found else []


def compiler() -> str | None:
    """The program of `compile_command`; None where there is none."""
    return next(iter(compile_command()), None)


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
    from ltepass import cache  # not above: setup.py runs this file before there is a package

    return cache.root()


def object_name(march: str) -> str:
    """Changes with the source, the flags, the ISA and the torch version, so that a stale object is never loaded."""
    return f"routed_ffn_{march}_{_digest(march, torch.__version__)}.so"


def prebuilt_name(march: str) -> str:
    """As `object_name`, for every torch version: an object in a wheel serves them all."""
    return f"routed_ffn_{march}_{_digest(march)}.so"


def _digest(march: str, *more: str) -> str:
    digest = hashlib.sha256(" ".join([*more, *flags(march)]).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:16]


def object_path() -> Path:
    """The object that `load` has loaded, or would."""
    return _prebuilt() or cache_dir() / object_name(isa())


def build(march: str, target: Path) -> None:
    """Compiles to a temporary name and renames: nobody ever sees half an object. Raises UnavailableError, OSError."""
    if compiler() is None:
        seen = f"CXX is {os.environ['CXX']!r}, and " if os.environ.get("CXX") else ""
        advice = "install g++ (apt install g++, dnf install gcc-c++) or set CXX"
        raise UnavailableError(f"{seen}no C++ compiler was found; {advice}")
    torch_dir = Path(torch.__file__).parent
    # torch's own OpenMP: a second one beside it would mean two pools of spinning threads.
    openmp = [str(lib) for lib in (torch_dir / "lib").glob("libgomp*.so*")]
    link = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", *openmp]
    command = compile_command()
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as tmp:
        out = Path(tmp) / target.name
        sources = [str(HERE / name) for name in SOURCES]
        words = [*command, *flags(march), f"-I{torch_dir / 'include'}", *sources, "-o", str(out), *link]
        _compile(words, Path(tmp))
        if not out.exists():
            raise UnavailableError(f"{' '.join(command)} wrote no object; {KNOWN_TO_WORK}")
        _seal(out)
        out.replace(target)


def _compile(words: list[str], tmp: Path) -> None:
    """Runs the compiler and all that it starts, for BUILD_SECONDS at most. Raises UnavailableError, OSError."""
    log = tmp / "log"
    with log.open("w") as file:  # a file: a pipe would wait for everybody who holds it
        env = {**os.environ, "TMPDIR": str(tmp)}
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, start_new_session=True
            )
        except OSError as error:
            raise UnavailableError(f"{words[0]} cannot be run ({error}); {KNOWN_TO_WORK}") from error
        try:
            code = process.wait(BUILD_SECONDS)
        except BaseException as error:
            _kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise UnavailableError(f"{words[0]} took more than {BUILD_SECONDS} s; {KNOWN_TO_WORK}") from error
            raise
    if code:
        seen = log.read_text(errors="replace")[-800:]
        raise UnavailableError(f"{words[0]} failed with exit status {code}: {seen}; {KNOWN_TO_WORK}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)  # with a session of its own it leads this group
    else:
        process.kill()
    process.wait()


def _seal(path: Path) -> None:
    """Appends the digest of an object: one that was cut short would end the process with a bus error when it is run."""
    content = path.read_bytes()
    with path.open("ab") as file:
        file.write(hashlib.sha256(content).digest())
    path.chmod(0o755)  # whatever the umask: others may read it, and not write


def loaded() -> bool:
    """Whether this process has the kernel, and may have run it."""
    return bool(_loaded)


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
    path = HERE / "prebuilt" / prebuilt_name(isa())
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
    from ltepass.errors import CacheError

    try:
        _load_or_build()
    except (CacheError, UnavailableError) as error:
        return _warn(str(error))
    except OSError as error:
        return _warn(f"the cache cannot be used ({error}); set LTEPASS_CACHE_DIR to a folder that can be")
    return True


def _load_or_build() -> None:
    from ltepass import cache

    folder = cache_dir()
    cache.private(folder)
    target = folder / object_name(isa())
    if _why_not(target) is None:
        return
    with cache.one_at_a_time(folder, BUILD_SECONDS):
        if _why_not(target) is None:  # another process has built it meanwhile
            return
        build(isa(), target)
        if reason := _why_not(target):
            raise UnavailableError(
                f"the object that was just built cannot be loaded ({reason}); set LTEPASS_CACHE_DIR to a folder where "
                f"programs may run, or CXX to another compiler; {KNOWN_TO_WORK}"
            )


def _why_not(path: Path) -> Exception | None:
    """Loads an object of the cache; what is wrong with it, or None."""
    from ltepass import cache
    from ltepass.errors import CacheError

    try:
        with cache.opened(path) as file:
            _load(file)
    except (CacheError, OSError) as error:
        return error
    return None


def _load(file: IO[bytes]) -> None:
    """Loads a whole object and sees that it is our kernel; OSError."""
    whole = file.read()
    if hashlib.sha256(whole[:-DIGEST]).digest() != whole[-DIGEST:]:
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


def which_path(T: int, d_model: int, d_ff: int, n_experts: int, dtype: torch.dtype) -> str:
    """In words, what a call of T tokens does; the active share, known during the call, decides the rest."""
    if not load():
        return "masked dense (PyTorch)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"masked dense (PyTorch): no kernel for {str(dtype).removeprefix('torch.')}"
    if T == 1:
        return f"C++ {isa()}: active neurons only"
    share = torch.ops.ltepass._dense_above(torch.empty(0, dtype=dtype), T, d_ff // n_experts)
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
