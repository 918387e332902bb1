"""`python -m examples.bench.tiers`: one token of an FFN in tiers of bits, beside the same FFN dense in int8 and int4.

All layers of a side one after the other, as a token meets them, so that none finds its weights in a cache; sides in
turns. Codes are random: no speed depends on them. p: share of neurons that read their low rows too; q: share that is
not at zero. planes: the op on planes as they are; packed: as a lowered or exported model has them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from examples.bench.single_neurons import SHAPES
from ltepass.kernels.linear import linear_int4, linear_int8
from ltepass.kernels.packed_planes import Packed, pack
from ltepass.kernels.packed_tiers import packed_tiered_ffn
from ltepass.kernels.proxy import proxy_scores
from ltepass.kernels.proxy_codes import MULTIPLIERS, Codes, blocks_of
from ltepass.kernels.tiers import tiered_ffn
from ltepass.kernels.tiers_reference import Planes
from ltepass.kernels.weight_formats import BLOCK, HALF
from ltepass.measure.machine import gemm_rate, last_level_cache, plain_reads
from ltepass.measure.records import Environment, append
from ltepass.measure.timing import Contender, interleaved

CSV = Path("examples/results/tiers.csv")
POINTS = ((0.0, 1.0), (0.05, 1.0), (0.1, 1.0), (0.1, 0.6))  # p and q
CACHES = 3  # as much as this times the last cache is read before a layer comes again
Sides = dict[tuple[str, float, float], list[Callable[[], Tensor]]]


@dataclass(frozen=True, kw_only=True)
class TiersRecord(Environment):
    """Medians of a layer, in us. share: of the time of reading what p and q ask for, at bandwidth_gbs."""

    shape: str
    p: float
    q: float
    packed_us: float
    planes_us: float
    int8_us: float
    int4_us: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An FFN: planes, as they are and packed, and what decides; x: [1, d_model]."""

    planes: Planes
    packed: Packed
    sizes: Tensor
    x: Tensor

    def threshold(self, share: float) -> Tensor:
        """[]: what this share of the scores lies above."""
        if share in (0.0, 1.0):
            return torch.tensor(-torch.inf if share else torch.inf)
        scores: Tensor = proxy_scores(self.x, *self.planes.high, None, self.sizes, *self.router(), "silu")
        return scores.flatten().quantile(1 - share)

    def router(self) -> tuple[Tensor, Tensor]:
        return torch.ones(len(self.sizes)), torch.zeros(())

    def of_planes(self, p: float, q: float) -> Callable[[], Tensor]:
        decides = (*self.router(), self.threshold(p), self.threshold(q))
        args = (*self.planes.high, None, self.sizes, *decides, *self.planes.down, *self.planes.low, None, "silu")
        return lambda: tiered_ffn(self.x, *args)

    def of_packed(self, p: float, q: float) -> Callable[[], Tensor]:
        args = (*self.packed, None, self.sizes, *self.router(), self.threshold(p), self.threshold(q), None, "silu")
        return lambda: packed_tiered_ffn(self.x, *args)


def layer(d_model: int, d_ff: int, x: Tensor) -> Layer:
    """Of random codes."""

    def codes(linears: int) -> Codes:
        blocks = blocks_of(d_model)
        pairs = torch.randint(0, 256, (linears, d_ff, HALF * blocks), dtype=torch.uint8)
        multipliers = torch.randint(1, MULTIPLIERS + 1, (linears, d_ff, blocks), dtype=torch.uint8)
        return Codes(pairs, multipliers, torch.full((linears, d_ff), 1e-3))

    planes = Planes(codes(2), codes(1), codes(3), None)
    return Layer(planes=planes, packed=pack(planes), sizes=torch.rand(d_ff), x=x)


def dense(d_model: int, d_ff: int, x: Tensor, format: str) -> Callable[[], Tensor]:
    """gate and up in one linear, as `ltepass export` merges them, and down."""

    def linear(d_out: int, d_in: int) -> Callable[[Tensor], Tensor]:
        if format == "int8":
            rows = torch.randint(-127, 128, (d_out, d_in), dtype=torch.int8)
            return lambda x: linear_int8(x, rows, scale)
        pairs = torch.randint(0, 256, (d_out, d_in // 2), dtype=torch.uint8)
        scales = torch.full((d_out, d_in // BLOCK), 1e-3, dtype=torch.float16)
        return lambda x: linear_int4(x, pairs, scales, None)

    scale = torch.full((2 * d_ff,), 1e-3)
    both, scale_of_down = linear(2 * d_ff, d_model), torch.full((d_model,), 1e-3)
    down_rows = torch.randint(-127, 128, (d_model, d_ff), dtype=torch.int8)
    down = linear(d_model, d_ff) if format == "int4" else lambda h: linear_int8(h, down_rows, scale_of_down)

    def ffn() -> Tensor:
        gate, up = both(x).chunk(2, -1)
        return down(F.silu(gate) * up)

    return ffn


def measure(name: str, *, seconds: float, run: str) -> list[TiersRecord]:
    """One row for each p and q, all from the same turns, on as many threads as torch has."""
    d_model, d_ff = SHAPES[name]
    torch.manual_seed(0)
    x = torch.randn(1, d_model)
    layers = [layer(d_model, d_ff, x)]
    high = sum(t.nbytes for codes in layers[0].planes[:2] for t in codes if t is not None)
    copies = max(2, math.ceil(CACHES * last_level_cache() / high))
    layers += [layer(d_model, d_ff, x) for _ in range(copies - 1)]
    sides: Sides = {(f, 0.0, 0.0): [dense(d_model, d_ff, x, f) for _ in range(copies)] for f in ("int8", "int4")}
    for p, q in POINTS:
        sides["planes", p, q] = [layer.of_planes(p, q) for layer in layers]
        sides["packed", p, q] = [layer.of_packed(p, q) for layer in layers]

    def whole(calls: list[Callable[[], Tensor]]) -> Contender:
        return lambda _: [call() for call in calls][-1]

    reads, size = plain_reads()
    contenders = {key: whole(calls) for key, calls in sides.items()}
    taken = interleaved(contenders | {("read", n, 0.0): read for n, read in enumerate(reads.values())}, seconds=seconds)
    bandwidth = size / min(taken["read", n, 0.0].median for n in range(len(reads)))
    here = Environment.here(run, bandwidth=bandwidth, flops=gemm_rate())
    us = {key: 1e6 * timing.median / copies for key, timing in taken.items()}

    def asked(p: float, q: float) -> float:
        """Bytes."""
        gate_and_up, down, low = (sum(t.nbytes for t in c if t is not None) for c in layers[0].planes[:3])
        return gate_and_up + max(p, q) * down + p * low

    return [
        TiersRecord(
            **vars(here),
            shape=name,
            p=p,
            q=q,
            packed_us=us["packed", p, q],
            planes_us=us["planes", p, q],
            int8_us=us["int8", 0.0, 0.0],
            int4_us=us["int4", 0.0, 0.0],
            share=1e6 * asked(p, q) / bandwidth / us["packed", p, q],
        )
        for p, q in POINTS
    ]


def markdown(records: Sequence[TiersRecord]) -> str:
    heads = ("FFN", "threads", "p", "q", "packed, us", "planes, us", "dense int8, us", "dense int4, us")
    lines = [f"| {' | '.join(heads)} | of the byte ideal |", "|---" * (len(heads) + 1) + "|"]
    for r in records:
        times = " | ".join(f"{us:.0f}" for us in (r.packed_us, r.planes_us, r.int8_us, r.int4_us))
        lines.append(f"| {r.shape} | {r.threads} | {r.p:g} | {r.q:g} | {times} | {r.share:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=10.0, help="rough time of the turns of each shape")
    parser.add_argument("--out", type=Path, default=CSV)
    asked = parser.parse_args(arguments)
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    records: list[TiersRecord] = []
    before = torch.get_num_threads()
    try:
        for shape, threads in product(asked.shapes, asked.threads.split(",")):
            torch.set_num_threads(int(threads))
            with torch.no_grad():
                records += measure(shape, seconds=asked.seconds, run=run)
    finally:
        torch.set_num_threads(before)
    append(asked.out, records)
    print(markdown(records))


if __name__ == "__main__":
    main()
