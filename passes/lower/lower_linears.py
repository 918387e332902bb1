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
from torch import Tensor
from torch.fx import GraphModule, Node

from ltepass.kernels import linear as _linear  # noqa: F401 -- registers the op that the pass emits
from ltepass.kernels.linear_checks import FLOATS
from ltepass.passes.graph.edit import erase_upstream, transposed
from ltepass.passes.graph.leaves_and_linears import Flow, Linear, parameters
from ltepass.passes.graph.node_kinds import is_gate, shape, tensor_inputs, value
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.passes.graph.walk import strip_identity

# Lowered models that were pickled earlier name them here.
from ltepass.passes.lower.linear_modules import FloatCall as FloatCall
from ltepass.passes.lower.linear_modules import Int4Call as Int4Call
from ltepass.passes.lower.linear_modules import Int8Call as Int8Call
from ltepass.passes.lower.plain_linears import is_ordinary


@dataclass(frozen=True, kw_only=True)
class LowerLinears:
    name: str = "lower_linears"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        flow = Flow(job.gm, parameters(job.gm))
        left: Counter[str] = Counter()
        for product, reason in reversed(read(flow)):  # a later one may read an earlier one's result as it is
            if reason is None:
                _lower(flow, product)
                job.linears += 1
            else:
                left[reason] += 1
        job.gm.recompile()
        return told(job.linears, "lowered", left)


def told(done: int, how: str, left: Counter[str]) -> str:
    """What a pass over the linears says: how many it changed, and how many it left for which reason."""
    reasons = "".join(f", {n} left: {reason}" for reason, n in left.items())
    return f"{done} linears {how}{reasons}" if done else f"unchanged{reasons}"


def read(flow: Flow) -> list[tuple[Linear, str | None]]:
    """The graph's linears in order, each with the reason why the op does not stand for it, or None."""
    scores = {strip_identity(n.args[1]) for n in flow.nodes() if is_gate(n) and isinstance(n.args[1], Node)}
    found = [linear for linear in map(flow.linear, list(flow.nodes())) if linear is not None]
    return [(x, "gives a gate its scores" if x.node in scores else _why_not(flow, x)) for x in found]


def _why_not(flow: Flow, linear: Linear) -> str | None:
    tensors = [value(n) for n in (linear.x, linear.weight, linear.node, linear.bias) if n is not None]
    if not all(isinstance(t, Tensor) and is_ordinary(t) for t in tensors):
        return "a tensor of another class"
    if any(t.device.type != "cpu" for t in tensors):
        return "not on the CPU"
    if tensors[0].dtype not in FLOATS or any(t.dtype != tensors[0].dtype for t in tensors):
        return "operands of several dtypes, or of one that the op does not read"
    if _reads_weight_through_cast(flow, linear):
        return "a weight that is cast there and back"
    if value(linear.weight).stride(1 - linear.out_dim) != 1:
        return "a weight stored [d_in, d_out]"
    if linear.bias is not None and shape(linear.bias) != (linear.width,):
        return "a bias that is not one number an output"
    return None


def _reads_weight_through_cast(flow: Flow, linear: Linear) -> bool:
    """Whether the weight is rounded between the leaf and the product, which reads it through casts."""
    dtype = value(linear.weight).dtype
    node = next(n for n in linear.product.all_input_nodes if (flow.leaf(n) or (None,))[0] is linear.weight)
    while node not in flow.leaves:
        if value(node).dtype != dtype:
            return True
        node = tensor_inputs(node)[0]
    return False


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
