"""The kernels as libraries that a process without Python can load: ops.so names our ops, kernels.so computes them.

Python names the ops itself (ltepass/kernels), so a process that imports ltepass loads neither.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch

from ltepass.errors import ExportError
from ltepass.kernels.cpu import build, loading

OPS, KERNELS = "ops.so", "kernels.so"


def write_ops(folder: Path) -> None:
    """Raises ExportError where the compiler fails."""
    (folder / KERNELS).write_bytes(loading.object_path().read_bytes())
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "ops.cpp"
        source.write_text(_source())
        # Loaded first, and found beside it by its name alone: the folder may move.
        link = ["-Wl,--no-as-needed", f"-L{folder}", f"-l:{KERNELS}", "-Wl,-rpath,$ORIGIN"]
        command = [*build.compile_command(), "-O1", "-std=c++20", "-fPIC", "-shared", f"-I{_torch() / 'include'}"]
        command += [f"-DTORCH_TARGET_VERSION={build.STABLE_ABI}", str(source), "-o", str(folder / OPS)]
        command += [f"-L{_torch() / 'lib'}", "-ltorch_cpu", *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{command[0]} failed with exit status {done.returncode}: {done.stderr[-800:]}")


def _torch() -> Path:
    return Path(torch.__file__).parent


def _source() -> str:
    """The schemas of all our ops, as Python has registered them."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("ltepass::")]
    lines = "".join(f'  m.def(R"({str(s).removeprefix("ltepass::")})");\n' for s in schemas)
    return f"#include <torch/csrc/stable/library.h>\n\nSTABLE_TORCH_LIBRARY(ltepass, m) {{\n{lines}}}\n"
