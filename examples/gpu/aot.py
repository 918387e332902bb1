"""Compiles every kernel ahead of time, with no GPU, and keeps registers, shared memory and spills in aot_table.csv.

    python -m examples.gpu.aot            # all of them: rewrites the table
    python -m examples.gpu.aot --every 40 # a sample: compares with the table, fails on a difference or a spill

What is compiled is what the host code launches: it runs on meta tensors with a launcher that records instead.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ltepass.kernels import reference
from ltepass.kernels.gpu import launch
from ltepass.kernels.gpu.call import Call

TABLE = Path(__file__).with_name("aot_table.csv")
# name in the table -> target, and the device whose rows of the tuning table apply
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "NVIDIA A100"),
    "sm_90": (GPUTarget("cuda", 90, 32), "NVIDIA H100"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "AMD Instinct MI300X"),
}
GROUP_SIZES = (8, 16, 32, 64, 128)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int8: "i8"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# (tokens, density): one path each; 8 and 32 tokens take tiles of 16 and 32
PATHS = ((1, None), (8, None), (32, 0.0), (512, 0.0), (512, None))
MOST_REGISTERS = 255  # of a thread
COLUMNS = ("kernel", "dtype", "variant", "num_warps", "num_stages", "target", "registers", "shared", "spills", "triton")


@dataclass(frozen=True)
class Launched:
    """One compilation: a kernel, the triton type of each argument, its constants, and how it is launched."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments that are multiples of 16: pointers, and sizes that happen to be
    num_warps: int
    num_stages: int
    dtype: str

    @property
    def variant(self) -> str:
        prefixes = ("BLOCK", "STAGES", "stride", *(["HAS_CUT"] if ("HAS_CUT", True) in self.constants else []))
        names = {"GROUP", "ACT", "GATED", "SPLITS", "UNION", "TF32", "PDL", "EXPERTS"}
        shown = ((k, int(v) if isinstance(v, bool) else v) for k, v in self.constants)
        return " ".join(f"{k}={v}" for k, v in shown if k in names or k.startswith(prefixes))

    @property
    def row_key(self) -> tuple[str, ...]:
        """The first columns of its row, without the target."""
        return (self.kernel.__name__, self.dtype, self.variant, str(self.num_warps), str(self.num_stages))


@cache
def launched(target: str) -> tuple[Launched, ...]:
    """Every distinct compilation that the host code asks for, over dtypes, activations, group sizes and layouts."""
    found: dict[Launched, None] = {}
    layouts = (False, True)
    axes = itertools.product(FLOATS, reference.ACTIVATIONS, GROUP_SIZES, (True, False), layouts, PATHS)
    for dtype, activation, group_size, gated, by_neuron, (n_tokens, density) in axes:
        args = _operands(dtype, activation, group_size, gated, by_neuron, n_tokens)
        found.update(dict.fromkeys(_record(args, density, TARGETS[target][1])))
        if activation == "silu":  # a cut comes after any activation
            cut = torch.empty((), dtype=torch.float32, device="meta")
            found.update(dict.fromkeys(_record((*args, cut), density, TARGETS[target][1])))
    if target == "sm_90":  # what a measured row of the tuning table may ask for there
        plain = [n for n in found if ("PDL", 0) in n.constants and dict(n.constants).get("ACT", "silu") == "silu"]
        found.update(dict.fromkeys(_overlapping(launch) for launch in plain))
    return tuple(found)


def _overlapping(launch: Launched) -> Launched:
    return replace(launch, constants=tuple((k, 1 if k == "PDL" else v) for k, v in launch.constants))


def _operands(
    dtype: torch.dtype, activation: str, group_size: int, gated: bool, by_neuron: bool, n_tokens: int
) -> tuple[Any, ...]:
    d_model, d_ff = 4096, 64 * group_size

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    fp32 = torch.float32
    router = (empty(64, d_model, dtype=fp32), empty(64, dtype=fp32), empty(dtype=fp32))
    gate = (empty(d_ff, d_model), empty(d_ff)) if gated else (None, None)
    down = empty(d_ff, d_model).t() if by_neuron else empty(d_model, d_ff)
    up = (empty(d_ff, d_model), empty(d_ff))
    return (empty(n_tokens, d_model), *router, *up, *gate, down, empty(d_model), activation)


def _record(args: tuple[Any, ...], density: float | None, device: str) -> list[Launched]:
    records: list[Launched] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **given: records.append(_compilation(self.kernel, given, args[0].dtype))

    launch.run(Call.of(args, launcher=Recorder, device=device), density)
    return records


def _compilation(kernel: Any, given: dict[str, Any], dtype: torch.dtype) -> Launched:
    """Specialised as triton's own launcher does: 1 becomes a constant, multiples of 16 are marked."""
    signature, constants, aligned = [], [], []
    for i, p in enumerate(kernel.params):
        value = given[p.name]
        if p.is_constexpr or (isinstance(value, int) and value == 1):
            signature.append((p.name, "constexpr"))
            constants.append((p.name, value))
            continue
        signature.append((p.name, "*" + DTYPES[value.dtype] if isinstance(value, Tensor) else "i32"))
        if isinstance(value, Tensor) or value % 16 == 0:
            aligned.append(i)
    how = {k: given[k] for k in ("num_warps", "num_stages")}
    return Launched(kernel, tuple(signature), tuple(constants), tuple(aligned), **how, dtype=DTYPES[dtype])


def compile_row(launch: Launched, target: str) -> dict[str, str]:
    """Compiles one and returns its row of the table."""
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(launch.kernel.arg_names.index(k),): v for k, v in launch.constants},
        {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    if ("PDL", 1) in launch.constants:
        options["launch_pdl"] = True
    compiled = triton.compile(source, target=TARGETS[target][0], options=options)
    registers, spills = _amd_usage(compiled) if target.startswith("gfx") else _nvidia_usage(compiled)
    numbers = {"registers": str(registers), "shared": str(compiled.metadata.shared), "spills": str(spills)}
    numbers["triton"] = triton.__version__
    names = dict(zip(COLUMNS, (*launch.row_key, target), strict=False))
    return {**names, **numbers}


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    """-> (registers a thread, instructions that spill or reload). A stack frame alone is no spill: it can be unused."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = (int(n) for n in found.groups())
        spilled = re.findall(r"\b(?:LDL|STL)\b", _output(tools / "nvdisasm", file.name)) if stack + local else []
    return registers, len(spilled)


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_usage(compiled: Any) -> tuple[int, int]:
    """-> (vector registers, spilled vector and scalar registers)."""
    text = compiled.asm["amdgcn"]
    counts = {k: int(v) for k, v in re.findall(r"\.([sv]gpr_(?:spill_)?count): *(\d+)", text)}
    return counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]


def rows(every: int = 1, jobs: int = 1) -> Iterator[dict[str, str]]:
    """Rows of the table, compiled now by `jobs` processes; with `every` = n, each n-th one."""
    work = [(target, i) for target in TARGETS for i in range(len(launched(target)))][::every]
    if jobs == 1:
        yield from map(_row, work)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(_row, work, chunksize=4)


def _row(work: tuple[str, int]) -> dict[str, str]:
    target, i = work  # a kernel cannot be pickled, its place in the list can
    return compile_row(launched(target)[i], target)


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[c] for c in COLUMNS[:6])


def differences(found: list[dict[str, str]], stored: list[dict[str, str]]) -> list[str]:
    """What is wrong with freshly compiled rows: a spill; a row the table lacks; other figures from the same triton.

    Of another triton, spills for want of registers: its assembler may keep a few values in memory long before, so that
    more programs fit.
    """
    known = {key(r): r for r in stored}
    tritons = {r["triton"] for r in stored}
    wrong = []
    for row in found:
        name = " ".join(key(row))
        if row["spills"] != "0" and (row["triton"] in tritons or int(row["registers"]) >= MOST_REGISTERS):
            wrong.append(f"{name}: spills {row['spills']}")
        if key(row) not in known:
            wrong.append(f"{name}: not in aot_table.csv; run python -m examples.gpu.aot")
        elif known[key(row)]["triton"] == row["triton"] and known[key(row)] != row:
            wrong.append(f"{name}: the table says {known[key(row)]}, compiled now {row}")
    return wrong


def stored() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--every", type=int, default=0, metavar="N", help="compile each N-th and compare, write nothing"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(argv)
    if options.every:
        wrong = differences(list(rows(options.every, options.jobs)), stored())
        print("\n".join(wrong) or "as in the table")
        return bool(wrong)
    with tempfile.NamedTemporaryFile("w", newline="", suffix=".csv", delete=False) as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows(jobs=options.jobs):
            writer.writerow(row)
            if row["spills"] != "0":
                print("spills:", " ".join(key(row)), row["spills"], flush=True)
    Path(file.name).chmod(0o644)
    shutil.move(file.name, TABLE)  # only a whole table replaces the committed one
    return 0


if __name__ == "__main__":
    sys.exit(main())
