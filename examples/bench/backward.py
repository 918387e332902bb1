"""`python -m examples.bench.backward`: a training step of one FFN, in eager and in the two forms of the op's backward.

The thresholds in kernels/routed_ffn_backward.py come from this table; it runs on one thread.
"""

from __future__ import annotations

import torch

from examples.bench.ways import Shape, decide, make_weights
from ltepass.kernels import reference
from ltepass.kernels.routed_ffn_backward import masked_dense, per_expert
from ltepass.measure.timing import Contender, Timing, interleaved

SHAPES = ((576, 1536, 8, 864), (576, 1536, 32, 864), (2048, 5632, 32, 512))  # d_model, d_ff, group size, tokens
SPARSITIES = (0.5, 0.8)


def contenders(d_model: int, d_ff: int, group_size: int, tokens: int, sparsity: float) -> dict[str, Contender]:
    """The masked form's forward and backward, the op's forward, and the op's backward in both forms; gated, fp32."""
    shape = Shape(tokens=min(tokens, d_model // 2), d_model=d_model, d_ff=d_ff, group_size=group_size)
    w, d = make_weights(shape, 1)[0], decide(shape, sparsity)
    repeats = tokens // shape.tokens  # a router can separate half as many tokens as it has inputs
    x, active = d.x.repeat(repeats, 1), d.active.repeat(repeats, 1)
    grad, threshold = torch.randn_like(x), torch.tensor(0.0)
    leaves = [t.detach().requires_grad_() for t in (x, w.up, w.gate, w.down) if t is not None]

    def eager(i: int) -> None:
        x, up, gate, down = leaves
        torch.autograd.grad(reference.masked_ffn(x, active, up, None, gate, None, down, None, "silu"), leaves, grad)

    def forward(i: int) -> None:
        with torch.no_grad():
            torch.ops.ltepass.routed_ffn(x, d.router, None, threshold, w.up, None, w.gate, None, w.down, None, "silu")

    args = (grad, x, active, w.up, None, w.gate, None, w.down, "silu", (True, True, False, True, False, True, False))

    def backward(i: int) -> None:
        with torch.no_grad():
            masked_dense(*args)

    def active_pairs(i: int) -> None:
        with torch.no_grad():
            per_expert(*args)

    return {"eager": eager, "the op's forward": forward, "`masked_dense`": backward, "`per_expert`": active_pairs}


def line(shape: tuple[int, int, int, int], sparsity: float, timings: dict[str, Timing]) -> str:
    """One row of the Markdown table, medians in ms."""
    d_model, d_ff, group_size, tokens = shape
    cells = (f"{d_model} x {d_ff}, {group_size}, {tokens}", f"{1 - sparsity:.0%}")
    return f"| {' | '.join((*cells, *(f'{1e3 * t.median:.0f}' for t in timings.values())))} |"


def main() -> None:
    torch.set_num_threads(1)
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            timings = interleaved(contenders(*shape, sparsity), seconds=2.0, min_repeats=3)
            print(line(shape, sparsity, timings), flush=True)


if __name__ == "__main__":
    main()
