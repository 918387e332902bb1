"""`python -m examples.bench.linear`: the linear ops against torch's own fp32 product, in turns, over cold weights.

Each row is a shape of SmolLM2-135M or Llama-3.2-1B: the speed at which weights are read, and the ratio to `F.linear` on
the same weight in fp32 (bf16: in bf16).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels import linear as ops
from ltepass.kernels import weight_formats
from ltepass.measure.timing import copies_needed, interleaved

SHAPES = ("576x576", "192x576", "1536x576", "576x1536", "49152x576", "2048x2048", "512x2048", "8192x2048", "2048x8192")
FORMATS = ("fp32", "bf16", "int8", "q4_0", "q4_1")

Stored = tuple[torch.Tensor | None, ...]


def stored(form: str, weight: torch.Tensor) -> tuple[Callable[..., torch.Tensor], Stored]:
    """The op of this format, and what it takes for a weight."""
    if form == "int8":
        return ops.linear_int8, weight_formats.quantise_int8(weight)
    if form.startswith("q4"):
        return ops.linear_int4, weight_formats.quantise_int4(weight, with_minimum=form == "q4_1")
    return ops.linear, (weight.bfloat16() if form == "bf16" else weight,)


def size(tensors: Sequence[Any]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def copies(tensors: Stored) -> list[Stored]:
    """So many that each call finds its own cold."""
    n = copies_needed(size(tensors), 2)
    return [tuple(None if t is None else t.clone() for t in tensors) for _ in range(n)]


def row(shape: str, form: str, tokens: int, seconds: float) -> str:
    d_out, d_in = map(int, shape.split("x"))
    weight = torch.randn(d_out, d_in)
    op, ours = stored(form, weight)
    stock = weight.bfloat16() if form == "bf16" else weight
    x = torch.randn(tokens, d_in, dtype=stock.dtype)
    our_copies, stock_copies = copies(ours), copies((stock,))

    def our_call(i: int) -> None:
        op(x, *our_copies[i % len(our_copies)])

    def stock_call(i: int) -> None:
        F.linear(x, stock_copies[i % len(stock_copies)][0])  # type: ignore[arg-type]

    timings = interleaved({"ours": our_call, "stock": stock_call}, seconds=seconds, min_repeats=5)
    ours_s, stock_s = timings["ours"].median, timings["stock"].median
    cells = (
        shape,
        form,
        str(tokens),
        f"{1e6 * ours_s:.0f}",
        f"{size(ours) / ours_s / 1e9:.1f}",
        f"{stock_s / ours_s:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 4, 8, 32))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| shape | format | tokens | us | GB/s | times F.linear |\n|---|---|---|---|---|---|")
    with torch.no_grad():
        for shape in args.shapes:
            for form in args.formats:
                for tokens in args.tokens:
                    print(row(shape, form, tokens, args.seconds), flush=True)


if __name__ == "__main__":
    main()
