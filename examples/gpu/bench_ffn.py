"""Times one FFN: one token, 8 tokens, prompts, group sizes; ours and the baselines, each over rotating weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.gpu import baselines, problems, results
from examples.gpu.clock import Timing, copy_bandwidth, graphed, streamed
from examples.gpu.problems import Masks, Problem, Shape
from examples.gpu.results import Row
from ltepass.kernels import reference
from ltepass.kernels.gpu import which_path
from ltepass.kernels.gpu.launch import routed_ffn

COPIES = 8  # a tenth of a 7B FFN is 30 MB: eight of them are well past an H100's 50 MB of L2
Operands = tuple[torch.Tensor, ...]


class Bench:
    """One run: a device, the copy bandwidth it has now, and the rows measured so far."""

    def __init__(self, device: str, software: str, out: Path) -> None:
        self.device, self.software, self.out = device, software, out
        self.dry = device == "cpu"
        self.copies = 1 if self.dry else COPIES
        self.bandwidth = copy_bandwidth()
        self.rows: list[Row] = []
        self.failed = 0
        self.dense_us: dict[tuple[str, int], float] = {}
        self.name = torch.cuda.get_device_name() if not self.dry else ""

    def shape(self, row: Row) -> Shape:
        d_model, d_ff = (64, 640) if self.dry else results.MODELS[row.model]
        tokens = min(row.tokens, 40) if self.dry else row.tokens
        dtype = torch.float32 if self.dry else torch.bfloat16
        return Shape(
            name=row.model, d_model=d_model, d_ff=d_ff, group_size=row.group_size or 32, tokens=tokens, dtype=dtype
        )

    def problems(self, row: Row, by_neuron: bool = False) -> list[Problem]:
        masks: Masks = "shared" if row.masks == "shared" else "independent"
        share = row.active_percent / 100
        where = (self.device,)
        return [
            problems.make(self.shape(row), share, masks, *where, seed=i, by_neuron=by_neuron)
            for i in range(self.copies)
        ]

    def keep(self, row: Row, timing: Timing | None, bytes_read: float, note: str = "") -> None:
        """Fills the row and writes all so far, so that a run cut short loses nothing."""
        if timing is None or self.bandwidth is None:
            return
        key = (row.model, row.tokens)
        if row.implementation == "dense compiled":
            self.dense_us[key] = timing.microseconds
        dense = self.dense_us.get(key)
        share = bytes_read / (timing.microseconds * 1e-6) / self.bandwidth
        speedup = dense / timing.microseconds if dense else None
        about = {"note": note, "device": self.name, "software": self.software}
        # bytes say nothing about a prompt, which is bound by arithmetic
        self.rows.append(
            row.filled(timing.microseconds, share if row.tokens < 64 else None, speedup, timing.spread, **about)
        )
        results.write(self.out, self.rows)
        print(results.table(self.rows[-1:]).splitlines()[-1], flush=True)


def dense(bench: Bench, row: Row) -> None:
    ffn: Callable[..., Any] = baselines.dense
    if row.implementation == "dense compiled" and not bench.dry:
        torch._dynamo.reset()  # each shape at its best: a second one would be compiled for any
        ffn = torch.compile(baselines.dense, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    given = [(p.args[0], p.args[4], p.args[6], p.args[8]) for p in bench.problems(row)]
    with torch.no_grad():
        timing = graphed([partial(ffn, *g) for g in given])
    bench.keep(row, timing, bench.shape(row).dense_bytes)


def routed(bench: Bench, row: Row) -> None:
    made = bench.problems(row, by_neuron="by neuron" in row.implementation)
    with which_path.assume_density(row.active_percent / 100):
        for p in made:
            _check(row, routed_ffn(*p.args), p)
        timing = graphed([partial(routed_ffn, *p.args) for p in made])
    union = sum(p.union for p in made) / len(made)
    note = f"union {union:.3f}" if 1 < row.tokens < 64 else ""
    bench.keep(row, timing, bench.shape(row).routed_bytes(union), note)


def _check(row: Row, y: torch.Tensor, p: Problem) -> None:
    """A fast wrong answer is no result: masks as drawn, values near PyTorch's dense and mask."""
    assert torch.equal(reference.mask(*p.args[:4]), p.mask), row
    expected = reference.routed_ffn(*p.args)
    error = float((y - expected).float().norm() / expected.float().norm())
    assert error < (1e-5 if y.dtype == torch.float32 else 2e-2), (row, error)


def baseline(bench: Bench, row: Row) -> None:
    shape, share = bench.shape(row), row.active_percent / 100
    calls = [_baseline_call(row.implementation, p, share) for p in bench.problems(row)]
    if row.implementation == "paper atomics":  # its host wait keeps it out of a graph
        bench.keep(row, streamed(calls), shape.routed_bytes(share), "eager: waits for the host")
        return
    part = share if row.implementation == "TEAL" else (1 + 2 * share) / 3
    bench.keep(row, graphed(calls), part * shape.dense_bytes, "single neurons")


def _baseline_call(name: str, p: Problem, share: float) -> Callable[[], object]:
    x, router, up, gate, down = (p.args[i] for i in (0, 1, 4, 6, 8))
    by_neuron = down.t().contiguous()
    gated = torch.nn.functional.silu(torch.nn.functional.linear(x, gate))[0]
    if name == "paper atomics":
        return partial(baselines.paper_atomics, x, router, up, gate, by_neuron)
    if name == "CATS":
        return partial(baselines.cats, x, up, gate, by_neuron, _limit(gated, share))
    h = torch.nn.functional.linear(x, up)[0] * gated  # of the dense FFN: what a calibrated threshold would see
    columns = (up.t().contiguous(), gate.t().contiguous(), by_neuron)
    return partial(baselines.teal, x, *columns, _limit(x[0], share), _limit(h, share))


def _limit(values: torch.Tensor, share: float) -> torch.Tensor:
    """[] fp32: the magnitude that this share of the values exceeds."""
    ordered = values.float().abs().sort(descending=True).values
    return ordered[min(round(share * len(ordered)), len(ordered) - 1)].clone()


def measure(bench: Bench, row: Row) -> None:
    if row.implementation.startswith("dense"):
        dense(bench, row)
    elif row.implementation.startswith("routed"):
        routed(bench, row)
    else:
        baseline(bench, row)
    if not bench.dry:
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    parser.add_argument("--software", default="")
    options = parser.parse_args(argv)
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", options.software, options.out)
    if bench.bandwidth is not None:
        print(f"copy bandwidth {bench.bandwidth / 1e12:.3f} TB/s on {bench.name}", flush=True)
    for row in results.expected():
        wanted = row.model == "LLaMA-2-7B" and row.active_percent in (100, 20) if bench.dry else True
        if wanted and not row.table.startswith("whole token"):
            bench.failed += not results.attempt(partial(measure, bench, row), row)
    results.write(options.out, bench.rows)
    return int(bench.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
