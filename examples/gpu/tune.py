"""Tries tile sizes for the kernels of one token and of a batch, and writes the tuning table with the winners appended.

Coordinate descent: one kernel at a time, the others as the table or an earlier winner has them. A candidate must give
the reference's result before its time counts. The search ends when its time is up; what it found so far stays.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from examples.gpu import problems
from examples.gpu.clock import graphed
from examples.gpu.problems import Problem, Shape
from ltepass.kernels import reference
from ltepass.kernels.gpu import tuning, which_path
from ltepass.kernels.gpu.launch import routed_ffn
from ltepass.kernels.gpu.tuning import Launch

# Most promising first: the search may be cut short. Every combination keeps 8 to 64 bytes of loads a thread in flight.
SPACE: dict[str, dict[str, list[int]]] = {
    "gate_up_one": {"BLOCK_N": [4, 2, 8, 1], "BLOCK_D": [512, 1024, 256], "STAGES": [1, 3], "num_warps": [4, 8, 2]},
    "down_one": {"BLOCK_O": [64, 32, 128, 16], "PROGRAMS": [1024, 2048, 512], "STAGES": [1, 3], "num_warps": [4, 2, 8]},
    "down_one_by_neuron": {
        "BLOCK_O": [128, 64, 256],
        "BLOCK_K": [16, 8, 32],
        "PROGRAMS": [1024, 512],
        "STAGES": [1, 3],
    },
    "router_one": {"BLOCK_E": [2, 1, 4], "BLOCK_D": [1024, 2048, 512], "STAGES": [1, 3], "num_warps": [4, 8]},
    "gate_up_many": {"BLOCK_N": [16, 32], "BLOCK_D": [128, 64, 256], "num_warps": [4, 2, 8], "num_stages": [3, 4]},
    "down_many": {"BLOCK_O": [64, 32, 128], "PROGRAMS": [512, 1024, 256], "num_warps": [4, 2], "num_stages": [3, 4]},
    "router_many": {"EXPERTS": [4, 2, 8, 16], "BLOCK_D": [64, 128], "num_stages": [3, 4]},
    "gate_up_grouped": {"BLOCK_T": [128, 64], "BLOCK_D": [64, 32], "num_warps": [8, 4], "num_stages": [3, 4]},
    "router_tokens": {"BLOCK_T": [64, 128], "BLOCK_D": [32, 64], "num_warps": [4, 8]},
}
OVERLAPPING = ("router_one", "gate_up_one", "down_one")  # PDL is one choice for all three
TIMES = {"gate_up_many": 8, "down_many": 8, "router_many": 8, "gate_up_grouped": 512, "router_tokens": 512}
ACTIVE = 0.2


class Search:
    def __init__(self, deadline: float, device: str) -> None:
        self.deadline, self.device = deadline, device
        self.gpu = torch.cuda.get_device_name() if device == "cuda" else ""
        self.where = f"{self.gpu}, torch {torch.__version__}, LLaMA-2-7B FFN, 20 % active"
        self.found: list[Launch] = []

    def problems(self, tokens: int, by_neuron: bool = False) -> list[Problem]:
        dry = self.device == "cpu"
        sizes = (64, 320) if dry else (4096, 11008)
        dtype = torch.float32 if dry else torch.bfloat16
        shape = Shape(
            name="tune", d_model=sizes[0], d_ff=sizes[1], tokens=min(tokens, 40) if dry else tokens, dtype=dtype
        )
        return [problems.make(shape, ACTIVE, "independent", self.device, i, by_neuron) for i in range(1 if dry else 8)]

    def microseconds(self, made: list[Problem]) -> float:
        """Infinite for a launch that fails (too much shared memory, say) or computes something else."""
        try:
            return self._microseconds(made)
        except Exception as failed:  # Triton's compiler has many: none ends the search
            print(f"skipped: {str(failed).splitlines()[0][:100]}", flush=True)
            return float("inf")

    def _microseconds(self, made: list[Problem]) -> float:
        with which_path.assume_density(ACTIVE):
            for p in made[:1]:
                y, expected = routed_ffn(*p.args).float(), reference.routed_ffn(*p.args).float()
                if not (y - expected).norm() < 2e-2 * expected.norm():
                    print("wrong result, skipped", flush=True)
                    return float("inf")
            timing = graphed([partial(routed_ffn, *p.args) for p in made])
        return timing.microseconds if timing else 0.0

    def kernel(self, name: str, left: int) -> None:
        """The best launch of one kernel, kept as an override and as a row; `left` kernels share the time left."""
        end = time.monotonic() + (self.deadline - time.monotonic()) / left
        made = self.problems(TIMES.get(name, 1), name.endswith("by_neuron"))
        start = tuning.launch_for(name, self.gpu, 16, 32)
        best, best_us = start, self.microseconds(made)
        for candidate in itertools.islice(candidates(start, SPACE[name]), 24):
            if time.monotonic() > end:
                break
            tuning.override(candidate, name)
            us = self.microseconds(made)
            if us < best_us:
                best, best_us = candidate, us
        tuning.override(best, name)
        if best_us < float("inf"):
            self.keep(best, best_us)

    def overlap(self) -> None:
        """Whether the three kernels of a token may start before their predecessors end."""
        made = self.problems(1)
        before = {name: tuning.launch_for(name, self.gpu, 16, 32) for name in OVERLAPPING}
        plain = self.microseconds(made)
        for name, launch in before.items():
            tuning.override(replace(launch, blocks={**launch.blocks, "PDL": 1}), name)
        overlapped = self.microseconds(made)
        print(f"PDL: {plain:.2f} us without, {overlapped:.2f} us with", flush=True)
        for name, launch in before.items():
            if overlapped >= plain:
                tuning.override(launch, name)
            else:
                self.keep(tuning.launch_for(name, self.gpu, 16, 32), overlapped)

    def keep(self, launch: Launch, us: float) -> None:
        group_size = "32" if launch.kernel == "down_one" else "*"  # the one kernel with general rows by group size
        place = replace(launch, device=self.gpu, bits="16", group_size=group_size, where=self.where)
        row = replace(place, microseconds=f"{us:.2f}")
        self.found = [r for r in self.found if r.kernel != launch.kernel] + [row]
        print(
            f"{launch.kernel}: {launch.blocks} {launch.num_warps} warps {launch.num_stages} stages {us:.2f} us",
            flush=True,
        )


def candidates(start: Launch, space: dict[str, list[int]]) -> Iterator[Launch]:
    """One choice changed at a time first, then all combinations."""
    seen = set()
    single = ({name: value} for name, values in space.items() for value in values[1:])
    every = (dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()))
    for change in itertools.chain(single, every):
        blocks = {**start.blocks, **change}
        warps, stages = (blocks.pop(k, getattr(start, k)) for k in ("num_warps", "num_stages"))
        launch = replace(start, blocks=blocks, num_warps=warps, num_stages=stages)
        if repr(launch) not in seen and launch != start:
            seen.add(repr(launch))
            yield launch


def write(path: Path, found: list[Launch]) -> None:
    """The committed table and, below it, so that they win, the rows found."""
    columns = ("kernel", "device", "bits", "group_size", "blocks", "num_warps", "num_stages", "microseconds", "where")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in (*tuning.table(), *found):
            blocks = " ".join(f"{k}={v}" for k, v in row.blocks.items())
            writer.writerow([blocks if c == "blocks" else getattr(row, c) for c in columns])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="tuning table to write")
    parser.add_argument("--seconds", type=float, default=100.0, help="time for the whole search")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    search = Search(time.monotonic() + options.seconds, "cuda" if gpu else "cpu")
    if not gpu:
        search.deadline = time.monotonic()  # a dry run: the starting points only
    for number, name in enumerate(SPACE):
        search.kernel(name, len(SPACE) - number)
        if name == "down_one" and gpu and torch.cuda.get_device_capability() >= (9, 0):
            search.overlap()
        write(options.out, search.found if gpu else [])


if __name__ == "__main__":
    main()
