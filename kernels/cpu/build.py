"""Builds the C++ kernel: with g++ alone, one object per source, ISA and torch version. `loading.py` asks for it.

A wheel may carry objects built ahead (`python -m ltepass.kernels.cpu.build DIR`, DIR = kernels/prebuilt); they go
through the stable ABI of torch 2.11, so one object serves every later torch. setup.py runs this file before there is a
package: it imports nothing of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = ("routed_ffn_cpu.cpp", "linear_cpu.cpp", "attention_cpu.cpp", "proxy_cpu.cpp", "tiers_cpu.cpp", "pool.cpp")
HEADERS = (
    "simd.h",
    "element_types.h",
    "activations.h",
    "problem.h",
    "tensors.h",
    "pool.h",
    "rows.h",
    "nibble_rows.h",
    "decode.h",
    "operands.h",
    "gemm.h",
    "chunk.h",
    "columns.h",
    "hidden.h",
    "batch.h",
    "dense.h",
    "dense_codes.h",
    "linear.h",
    "linear_tensors.h",
    "active.h",
    "attention.h",
    "attention_tiles.h",
    "quantised_inputs.h",
    "quantised.h",
    "long_inputs.h",
    "shortlist.h",
    "read_pass.h",
    "token_codes.h",
    "turned_rows.h",
    "proxy.h",
    "integer_scores.h",
    "proxy_tensors.h",
    "tier_runs.h",
    "tiers.h",
    "packed_tiers.h",
    "routed_tensors.h",
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
BUILD_SECONDS = 600  # 25 on an idle core, above 180 on a crowded one
KNOWN_TO_WORK = "a g++ of version 11 or later is known to work"


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
        said = log.read_text(errors="replace")
        seen = said[max(said.find("error:") - 400, 0) :][:800]  # warnings may stand before it, and behind it
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
