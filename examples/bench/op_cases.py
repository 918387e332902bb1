"""What `ltepass bench op` measures, and what must come out: two literal tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from examples.bench.ways import Shape

SPARSITIES = (0.0, 0.1, 0.2, 0.5, 0.75, 0.9, 1.0)  # the last: what is left when no expert is active
CODED_SPARSITIES = (0.0, 0.5, 0.75, 0.9)  # of weights in 8 and in 4 bits
TARGETS_AT = (0.5, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape on a number of threads. peers: other ways to skip neurons are measured beside it; compiled: dense under
    inductor is, which takes minutes to tune for thousands of tokens."""

    name: str
    shape: Shape
    threads: int
    peers: bool = False
    compiled: bool = True


def _case(name: str, d_model: int, d_ff: int, tokens: int, dtype: str, threads: int, gated: bool = True) -> Case:
    shape = Shape(tokens=tokens, d_model=d_model, d_ff=d_ff, gated=gated, dtype=getattr(torch, dtype))
    return Case(name=name, shape=shape, threads=threads, peers=tokens == 1 and gated, compiled=tokens <= 256)


F32, BF16 = "float32", "bfloat16"
CASES = (
    _case("7b-fp32-1", 4096, 11008, 1, F32, 1),
    _case("7b-fp32-2", 4096, 11008, 1, F32, 2),
    _case("7b-bf16-1", 4096, 11008, 1, BF16, 1),
    _case("7b-bf16-2", 4096, 11008, 1, BF16, 2),
    _case("1b-fp32-1", 2048, 8192, 1, F32, 1),
    _case("1b-fp32-2", 2048, 8192, 1, F32, 2),
    _case("1b-bf16-1", 2048, 8192, 1, BF16, 1),
    _case("1b-bf16-2", 2048, 8192, 1, BF16, 2),
    _case("small-gated-fp32", 768, 3072, 1, F32, 2),
    _case("small-gated-bf16", 768, 3072, 1, BF16, 2),
    _case("small-plain-fp32", 768, 3072, 1, F32, 2, gated=False),
    _case("small-plain-bf16", 768, 3072, 1, BF16, 2, gated=False),
    _case("tokens-2", 2048, 5632, 2, F32, 2),
    _case("tokens-4", 2048, 5632, 4, F32, 2),
    _case("tokens-8", 2048, 5632, 8, F32, 2),
    _case("tokens-16", 2048, 5632, 16, F32, 2),
    _case("tokens-32", 2048, 5632, 32, F32, 2),
    _case("prefill-256-fp32", 4096, 11008, 256, F32, 2),
    _case("prefill-2048-fp32", 4096, 11008, 2048, F32, 2),
    _case("prefill-256-bf16", 4096, 11008, 256, BF16, 2),
    _case("prefill-2048-bf16", 4096, 11008, 2048, BF16, 2),
)

# What a time is divided by: the fastest of these contenders.
STOCK = ("dense eager", "dense compiled")
CALL = "call alone"  # the op on next to no FFN
Over = Literal["best stock dense", "stock dense", "dense compiled", "best dense", "every expert on"]
BASELINES: dict[Over, tuple[str, ...]] = {
    "best stock dense": STOCK,
    "stock dense": ("dense eager",),
    "dense compiled": ("dense compiled",),
    "best dense": ("dense eager", "dense compiled", "dense upcast"),
    "every expert on": ("routed",),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """values: the least speed-up at each sparsity; with `of_ideal`, as a share of (bytes of the baseline) / (bytes).

    worst: the table shows the case that does worst, not all of them.
    """

    where: str
    cases: tuple[str, ...]
    over: Over
    values: tuple[float, ...]
    at: tuple[float, ...] = TARGETS_AT
    of_ideal: bool = False
    worst: bool = False


_ONE_TOKEN = tuple(
    f"{model}-{dtype}-{threads}" for model in ("7b", "1b") for dtype in ("fp32", "bf16") for threads in (1, 2)
)
_BATCHES = tuple(f"tokens-{n}" for n in (2, 4, 8, 16, 32))
_PREFILL = ("prefill-256-fp32", "prefill-2048-fp32", "prefill-256-bf16", "prefill-2048-bf16")
TARGETS = (
    Target(
        where="one token, fp32, 1 thread, as a share of the byte ideal",
        cases=("7b-fp32-1", "1b-fp32-1"),
        over="best stock dense",
        values=(0.95, 0.95, 0.90),
        of_ideal=True,
    ),
    Target(
        where="one token, as a share of the byte ideal",
        cases=_ONE_TOKEN,
        over="every expert on",
        values=(0.93, 0.90, 0.80),
        of_ideal=True,
    ),
    Target(
        where="one token, fp32, every expert on",
        cases=tuple(name for name in _ONE_TOKEN if "fp32" in name),
        over="best stock dense",
        values=(0.95,),
        at=(0.0,),
    ),
    Target(where="one token, bf16", cases=("7b-bf16-2",), over="best stock dense", values=(3.0, 5.5, 11.0)),
    Target(
        where="one token, small, gated",
        cases=("small-gated-fp32", "small-gated-bf16"),
        over="best stock dense",
        values=(1.8, 3.0, 5.5),
    ),
    Target(
        where="one token, small, plain",
        cases=("small-plain-fp32", "small-plain-bf16"),
        over="best stock dense",
        values=(1.4, 2.2, 3.0),
    ),
    Target(where="tokens at once", cases=_BATCHES, over="dense compiled", values=(1.2, 1.7, 2.5)),
    Target(where="prefill, fp32", cases=_PREFILL[:2], over="stock dense", values=(1.3, 2.0, 4.0)),
    Target(where="prefill, bf16", cases=_PREFILL[2:], over="best dense", values=(1.3, 2.0, 4.0)),
    Target(
        where="any number of tokens, hardly sparse",
        cases=(*_ONE_TOKEN, *_BATCHES, *_PREFILL),
        over="stock dense",
        values=(0.95, 0.95, 0.95),
        at=(0.0, 0.1, 0.2),
        worst=True,
    ),
)
