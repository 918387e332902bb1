"""quantise_linears: a plain linear's weight becomes codes of 8 or 4 bits, and the linear the op that reads them.

    before:  y = linear(x, W, b)
    after:   y = ltepass::linear_int8(x, codes, scale, b)          bits = 8
             y = ltepass::linear_int4(x, codes, scale, minimum, b)  bits = 4; minimum is None where it is not asked for

Not the same numbers: that is what was asked for. kernels/linear_reference.py says what each op means. The codes are
new leaves, so this is for a graph that has its weights to itself: one that is being exported. Routers stay as they are,
where rounding could flip an expert; so do lowered FFNs, whose op reads floats, and rows that no block of 32 divides.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from ltepass.kernels.linear_reference import BLOCK, quantise_int4, quantise_int8
from ltepass.passes.graph.leaves import add_leaf, held, parameters
from ltepass.passes.graph.linears import Flow, Linear
from ltepass.passes.graph.node_kinds import shape
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.passes.lower.lower_linears import put_op, read, told

Format = Literal["int8", "int4", "int4_minimum"]


@dataclass(frozen=True, kw_only=True)
class QuantiseLinears:
    format: Format | None = None  # None quantises nothing
    name: str = "quantise_linears"
    tier: Tier = "quantised"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        if self.format is None:
            return "unchanged"
        flow, left, codes = Flow(job.gm, parameters(job.gm)), Counter[str](), dict[str, tuple[Tensor | None, ...]]()
        for linear, unread in reversed(read(flow)):  # a later one may read an earlier one's result as it is
            reason = unread or self._why_not(linear)
            if reason is not None:
                left[reason] += 1
                continue
            self._quantise(job.gm, linear, codes)
            job.linears += 1
        job.gm.recompile()
        return told(job.linears, "quantised", left)

    def _why_not(self, linear: Linear) -> str | None:
        if linear.weight.op != "get_attr":
            return "a weight that is no leaf of the graph's own"
        if linear.out_dim != 0:
            return "a weight stored [d_in, d_out]"
        if self.format != "int8" and shape(linear.weight)[1] % BLOCK:
            return f"d_in is no multiple of {BLOCK}"
        return None

    def _quantise(self, gm: GraphModule, linear: Linear, done: dict[str, tuple[Tensor | None, ...]]) -> None:
        name = str(linear.weight.target)
        if name not in done:
            done[name] = self._codes(held(gm, linear.weight))
        with gm.graph.inserting_before(linear.node):
            parts = [
                None if tensor is None else add_leaf(gm, f"{name.replace('.', '_')}_{part}", tensor)
                for part, tensor in zip(("codes", "scale", "minimum"), done[name], strict=False)
            ]
        ops = torch.ops.ltepass
        put_op(gm, linear, ops.linear_int8.default if self.format == "int8" else ops.linear_int4.default, *parts)

    def _codes(self, weight: Tensor) -> tuple[Tensor | None, ...]:
        if self.format == "int8":
            return quantise_int8(weight)
        return quantise_int4(weight, with_minimum=self.format == "int4_minimum")
