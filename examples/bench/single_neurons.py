"""`python -m examples.bench.single_neurons`: what single neurons cost beside experts of 8, and their choice.

One token of one FFN under a proxy router, cold, in turns: experts of 8 and of 1 at the same active
share, weights as a model has them or stored neuron by neuron, and the scan of the router's codes alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from examples.bench.ways import Shape, Weights, make_weights
from ltepass.kernels import proxy_codes
from ltepass.kernels.proxy import proxy_scores
from ltepass.kernels.proxy_reference import Proxy
from ltepass.kernels.routed_ffn import routed_proxy_ffn
from ltepass.measure.machine import gemm_rate, plain_reads
from ltepass.measure.records import Environment, append
from ltepass.measure.timing import Contender, copies_needed, interleaved

CSV = Path("examples/results/single_neurons.csv")
SHAPES = {"smollm2-135m": (576, 1536), "qwen2.5-0.5b": (896, 4864), "llama-3.2-1b": (2048, 8192)}
ACTIVE = (0.5, 0.3, 0.2, 0.1)
EXPERTS = 8  # neurons of an expert, where not one


@dataclass(frozen=True, kw_only=True)
class NeuronRecord(Environment):
    """Medians of one call, in ms, the scan in each. active: share of the neurons.

    experts_ms: of 8 neurons; neurons_ms: single ones; stored_ms: these, gate row, up row and down column side by side.
    scan_ms: of the codes alone; scan_share: of the time of reading them at bandwidth_gbs.
    """

    shape: str
    dtype: str
    active: float
    experts_ms: float
    neurons_ms: float
    stored_ms: float
    scan_ms: float
    scan_share: float

    @property
    def over_experts(self) -> float:
        return min(self.neurons_ms, self.stored_ms) / self.experts_ms


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A router that makes `share` of its experts active for x. bias: [] fp32; weight: [n_experts] fp32."""

    proxy: Proxy
    weight: Tensor
    bias: Tensor


def choose(x: Tensor, proxy: Proxy, experts: int, share: float) -> Chosen:
    weight, zero = torch.ones(experts), torch.tensor(0.0)
    logits = proxy_scores(x, *proxy, weight, zero, "silu").flatten().sort(descending=True).values
    n = round(share * experts)
    return Chosen(proxy=proxy, weight=weight, bias=-(logits[n - 1 : n + 1]).mean())


def proxy_of(w: Weights) -> Proxy:
    assert w.gate is not None
    codes = proxy_codes.quantise(torch.stack([w.gate, w.up]), blocks=True)
    return Proxy(codes.codes, codes.multipliers, codes.scales, None, w.down_rows.float().norm(dim=0))


def stored(w: Weights) -> Weights:
    """The same, each neuron's three vectors side by side."""
    assert w.gate is not None
    whole = torch.stack([w.gate, w.up, w.down.t()], 1)
    return Weights(up=whole[:, 1], gate=whole[:, 0], down=whole[:, 2].t(), down_rows=w.down_rows)


def measure(name: str, dtype: torch.dtype, *, seconds: float, run: str) -> list[NeuronRecord]:
    """One row for each active share, all from the same turns, on as many threads as torch has."""
    d_model, d_ff = SHAPES[name]
    shape = Shape(tokens=1, d_model=d_model, d_ff=d_ff, group_size=1, dtype=dtype)
    weights = make_weights(shape, copies_needed(shape.weight_bytes * min(ACTIVE), 3 * len(ACTIVE) + 1))
    proxies, aside = [proxy_of(w) for w in weights], [stored(w) for w in weights]
    x = torch.randn(1, d_model, generator=torch.Generator().manual_seed(1)).to(dtype)
    threshold = torch.tensor(0.0)

    def ffn(share: float, experts: int, held: Sequence[Weights]) -> Contender:
        routers = [choose(x, proxy, experts, share) for proxy in proxies]
        calls = [
            (x, *r.proxy, r.weight, r.bias, threshold, w.up, None, w.gate, None, w.down, None, "silu")
            for r, w in zip(routers, held, strict=True)
        ]
        return lambda i: routed_proxy_ffn(*calls[i % len(calls)])

    scans = [choose(x, proxy, d_ff, 0.5) for proxy in proxies]

    def scan(i: int) -> Tensor:
        r = scans[i % len(scans)]
        logits: Tensor = proxy_scores(x, *r.proxy, r.weight, r.bias, "silu")
        return logits

    contenders: dict[tuple[str, float], Contender] = {("scan", 0.0): scan}
    for share in ACTIVE:
        contenders["experts", share] = ffn(share, d_ff // EXPERTS, weights)
        contenders["neurons", share] = ffn(share, d_ff, weights)
        contenders["stored", share] = ffn(share, d_ff, aside)
    reads, size = plain_reads()
    taken = interleaved(contenders | {("read", n): read for n, read in enumerate(reads.values())}, seconds=seconds)
    bandwidth = size / min(taken["read", n].median for n in range(len(reads)))
    here = Environment.here(run, bandwidth=bandwidth, flops=gemm_rate())
    ms = {key: 1e3 * timing.median for key, timing in taken.items()}
    codes = statistics.fmean(sum(t.nbytes for t in proxy if t is not None) for proxy in proxies)
    return [
        NeuronRecord(
            **vars(here),
            shape=name,
            dtype=str(dtype).removeprefix("torch."),
            active=share,
            experts_ms=ms["experts", share],
            neurons_ms=ms["neurons", share],
            stored_ms=ms["stored", share],
            scan_ms=ms["scan", 0.0],
            scan_share=1e3 * codes / bandwidth / ms["scan", 0.0],
        )
        for share in ACTIVE
    ]


def markdown(records: Sequence[NeuronRecord]) -> str:
    heads = ("FFN", "dtype", "threads", "active", "experts of 8", "single neurons", "stored by neuron", "over", "scan")
    lines = [f"| {' | '.join(heads)} | of its read |", "|---" * (len(heads) + 1) + "|"]
    for r in records:
        times = " | ".join(f"{ms:.3f}" for ms in (r.experts_ms, r.neurons_ms, r.stored_ms))
        what = f"{r.shape} | {r.dtype} | {r.threads} | {r.active:.0%}"
        lines.append(f"| {what} | {times} | x{r.over_experts:.2f} | {r.scan_ms:.3f} | {r.scan_share:.0%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=10.0, help="rough time of the turns of each shape")
    parser.add_argument("--out", type=Path, default=CSV)
    asked = parser.parse_args(arguments)
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    records: list[NeuronRecord] = []
    before = torch.get_num_threads()
    try:
        for shape, dtype, threads in product(asked.shapes, asked.dtypes.split(","), asked.threads.split(",")):
            torch.set_num_threads(int(threads))
            with torch.no_grad():
                records += measure(shape, getattr(torch, dtype), seconds=asked.seconds, run=run)
    finally:
        torch.set_num_threads(before)
    append(asked.out, records)
    print(markdown(records))


if __name__ == "__main__":
    main()
