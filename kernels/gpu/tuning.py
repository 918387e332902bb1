"""Which blocks and warps a GPU kernel takes: looked up in tuning_table.csv, never searched at a user's first call.

A row of the table: kernel; device ("*" or a part of the device's name); bits of the weights' dtype ("*", 16, 32);
group_size ("*" or a number); blocks ("BLOCK_N=4 BLOCK_D=512"); num_warps; num_stages; microseconds and where it was
measured, "not measured" for a starting point from counting bytes. The last row that fits wins, so measured rows of
one device go below the general ones. `examples/gpu/run_all.py` tunes and writes such rows.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# LTEPASS_TUNING_TABLE names another table, such as one that run_all.py has just written for this machine.
TABLE = Path(os.environ.get("LTEPASS_TUNING_TABLE") or Path(__file__).with_name("tuning_table.csv"))


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
    """The table's choice. kernel: a kernel's name, or "paths" for the break-evens of `which_path.choose_path`."""
    if kernel in _overrides:
        return _overrides[kernel]
    rows = [r for r in table() if r.kernel == kernel and r.fits(device, bits, group_size)]
    assert rows, f"tuning_table.csv has no row for {kernel}; every kernel needs one with * in device, bits, group_size"
    return rows[-1]


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, "cpu" under the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
