"""lower_linears: a plain linear becomes one op that reads its weight at the memory's speed, in Dynamo's graph.

    before:  q = linear(x, Wq, bq); y = addmm(b, h, W.t()); z = matmul(h, V.t()) + c
    after:   q = ltepass::linear(x, Wq, bq); y = ltepass::linear(h, W, b); z = ltepass::linear(h, V, c)

Legal because the op is defined as that product (kernels/linear.py), and every operand has one dtype, in and out:
nothing is cast on the way, by autocast or by the code; only the order of sums differs. Routers' linears stay, where
another order could flip an expert, and so does whatever has no weight of ordinary rows on the CPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ltepass.kernels import linear as _linear  # noqa: F401 -- registers the op that the pass emits
from ltepass.passes.graph.edit import erase_upstream, transposed
from ltepass.passes.graph.leaves_and_linears import Flow, Linear, parameters
from ltepass.passes.graph.pipeline import GraphJob, Tier, told

# Lowered models that were pickled earlier name them here.
from ltepass.passes.lower.lower_linear_modules import FloatCall as FloatCall
from ltepass.passes.lower.lower_linear_modules import Int4Call as Int4Call
from ltepass.passes.lower.lower_linear_modules import Int8Call as Int8Call
from ltepass.passes.lower.why_not_linear import read_linears


@dataclass(frozen=True, kw_only=True)
class LowerLinears:
    name: str = "lower_linears"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        flow = Flow(job.gm, parameters(job.gm))
        left: Counter[str] = Counter()
        for product, reason in reversed(read_linears(flow)):  # a later one may read an earlier one's result as it is
            if reason is None:
                _lower(flow, product)
                job.linears += 1
            else:
                left[reason] += 1
        job.gm.recompile()
        return told(job.linears, "lowered", left)


def _lower(flow: Flow, linear: Linear) -> None:
    with flow.gm.graph.inserting_before(linear.node):
        weight = linear.weight if linear.out_dim == 0 else transposed(flow.gm, linear.weight)
    put_op(flow.gm, linear, torch.ops.ltepass.linear.default, weight)


def put_op(gm: GraphModule, linear: Linear, op: torch._ops.OpOverload, *weights: Node | None) -> None:
    """An op of (x, its weights, the bias) in the place of a linear."""
    with gm.graph.inserting_before(linear.node):
        new = gm.graph.call_function(op, (linear.x, *weights, linear.bias))
        new.meta = dict(linear.node.meta)
    linear.node.replace_all_uses_with(new)
    erase_upstream(linear.node)
