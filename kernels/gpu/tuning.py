"""Which blocks, warps and path a GPU call takes: looked up in tuning_table.csv, never searched at a user's first call.

A row of the table: kernel; device ("*" or a part of the device's name); bits of the weights' dtype ("*", 16, 32);
group_size ("*" or a number); blocks ("BLOCK_N=4 BLOCK_D=512"); num_warps; num_stages; microseconds and where it was
measured, "not measured" for a starting point from counting bytes. The last row that fits wins, so measured rows of
one device go below the general ones. `examples/gpu/run_all.py` tunes and writes such rows.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

# LTEPASS_TUNING_TABLE names another table, such as one that run_all.py has just written for this machine.
TABLE = Path(os.environ.get("LTEPASS_TUNING_TABLE") or Path(__file__).with_name("tuning_table.csv"))
ROUTED_PATHS = ("one", "union", "grouped")
GPUPath = Literal["one", "union", "grouped", "dense"]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel is launched. blocks: its tile sizes (powers of two) and other choices, by constexpr name."""

    kernel: str
    device: str
    bits: str
    group_size: str
    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    microseconds: str
    where: str

    def fits(self, device: str, bits: int, group_size: int) -> bool:
        return (
            (self.device == "*" or self.device in device)
            and self.bits in ("*", str(bits))
            and self.group_size in ("*", str(group_size))
        )

    def fit(self, least: int = 1, **sizes: int) -> dict[str, int]:
        """The blocks, those named in `sizes` cut to what an axis of that size needs but to no less than `least`."""
        cut = {name: max(least, min(self.blocks[name], 1 << (n - 1).bit_length())) for name, n in sizes.items()}
        return {**self.blocks, **cut}


@cache
def table(path: Path = TABLE) -> tuple[Launch, ...]:
    """The rows of a tuning table, top to bottom."""
    with path.open(newline="") as file:
        return tuple(_row(r) for r in csv.DictReader(file))


def _row(r: dict[str, str]) -> Launch:
    blocks = {k: int(v) for k, _, v in (pair.partition("=") for pair in r["blocks"].split())}
    numbers = {"num_warps": int(r["num_warps"]), "num_stages": int(r["num_stages"])}
    names = ("kernel", "device", "bits", "group_size", "microseconds", "where")
    return Launch(blocks=blocks, **numbers, **{n: r[n] for n in names})  # type: ignore[arg-type]


_overrides: dict[str, Launch] = {}


def override(launch: Launch | None, kernel: str) -> None:
    """For tuning runs: every later call launches `kernel` so; None goes back to the table."""
    launch_for.cache_clear()
    if launch is None:
        _overrides.pop(kernel, None)
    else:
        _overrides[kernel] = launch


@cache
def launch_for(kernel: str, device: str, bits: int, group_size: int) -> Launch:
    """The table's choice. kernel: a kernel's name, or "paths" for the break-evens of `choose_path`."""
    if kernel in _overrides:
        return _overrides[kernel]
    rows = [r for r in table() if r.kernel == kernel and r.fits(device, bits, group_size)]
    assert rows, f"tuning_table.csv has no row for {kernel}; every kernel needs one with * in device, bits, group_size"
    return rows[-1]


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, "cpu" under the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type


_assumed: ContextVar[float | None] = ContextVar("assumed_density", default=None)


@contextmanager
def assume_density(density: float | None) -> Iterator[None]:
    """The share of (token, expert) pairs that calibration expects to be active, for calls and compiles in the block.

    Told by whoever calls the op for a router: the op sees tensors only, and must not wait for a device to count. A
    stale value costs time, never a wrong result.
    """
    token = _assumed.set(density)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed_density() -> float | None:
    return _assumed.get()


def choose_path(n_tokens: int, density: float | None, paths: Launch) -> GPUPath:
    """The fastest exact path for a call, from host values only: the number of tokens and the calibrated density.

    one: three launches, one token. union: three launches, a weight is read when any token wants it. grouped: one
    product per expert for gate and up, dense down. dense: dense products and a mask, which no density makes slower.
    """
    limits = paths.blocks
    if n_tokens == 1:
        return "one"
    if n_tokens <= limits["UNION_ALWAYS"]:
        return "union"
    expected = 1.0 if density is None else density
    if n_tokens <= limits["UNION_TOKENS"]:
        union = 1.0 - (1.0 - expected) ** n_tokens  # tokens that choose independently: the worst case
        return "union" if union * 100 <= limits["UNION_PERCENT"] else "dense"
    return "grouped" if expected * 100 <= limits["GROUPED_PERCENT"] else "dense"
