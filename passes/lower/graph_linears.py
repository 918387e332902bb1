"""lower_linears: in Dynamo's graph, a plain linear becomes one op that reads its weight at the memory's speed.

    before:  y = linear(x, W, b)
    after:   y = ltepass::linear(x, W, b)

Legal because the op is defined as that product (kernels/linear.py), in the dtype that x, W and y share; only the order
of its sums differs. W is a parameter or buffer whose rows lie whole on the CPU. Routers' linears stay: a decision is
taken from the sums that eager mode has. Graphs with an autocast region, whose dtypes nodes do not tell, stay too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ltepass.passes.graph.linears import Flow, Linear
from ltepass.passes.graph.node_kinds import (
    erase_upstream,
    is_gate,
    is_plain_tensor,
    op_name,
    shape,
    strip_identity,
    tensor_inputs,
    value,
)
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.passes.lower.graph_regions import parameters, transposed
from ltepass.passes.lower.linears import FLOATS  # and registers the op that the pass emits


@dataclass(frozen=True, kw_only=True)
class LowerLinears:
    name: str = "lower_linears"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        flow = Flow(job.gm, parameters(job.gm))
        if any("autocast" in (op_name(node) or "") for node in flow.nodes()):
            return "unchanged: autocast"
        scores = {strip_identity(n.args[1]) for n in flow.nodes() if is_gate(n) and isinstance(n.args[1], Node)}
        found = [x for x in map(flow.linear, list(flow.nodes())) if x is not None and x.node not in scores]
        served = [x for x in found if _served(flow, x)]
        for x in reversed(served):  # a later one may read an earlier one's result as it is
            _lower(flow, x)
        job.linears = len(served)
        job.gm.recompile()
        return f"{len(served)} linears lowered" if served else "unchanged"


def _served(flow: Flow, linear: Linear) -> bool:
    weight, x, y = value(linear.weight), value(linear.x), value(linear.node)
    if not is_plain_tensor(linear.x) or x.dim() == 0 or weight.device.type != "cpu" or weight.dtype not in FLOATS:
        return False
    bias = None if linear.bias is None else value(linear.bias)
    if bias is not None and (bias.dtype != weight.dtype or shape(linear.bias) != (linear.width,)):  # type: ignore[arg-type]
        return False
    rows_lie_whole = weight.stride(1 - linear.out_dim) == 1
    return rows_lie_whole and x.dtype == y.dtype == weight.dtype and _uncast(flow, linear)


def _uncast(flow: Flow, linear: Linear) -> bool:
    """Whether the product reads the weight as it is: a cast there and back would have rounded it."""
    dtype = value(linear.weight).dtype
    node = next(n for n in linear.product.all_input_nodes if (flow.leaf(n) or (None,))[0] is linear.weight)
    while node not in flow.leaves:
        if value(node).dtype != dtype:
            return False
        node = tensor_inputs(node)[0]
    return True


def _lower(flow: Flow, linear: Linear) -> None:
    with flow.gm.graph.inserting_before(linear.node):
        weight = linear.weight if linear.out_dim == 0 else transposed(flow, linear.weight)
        new = flow.gm.graph.call_function(torch.ops.ltepass.linear.default, (linear.x, weight, linear.bias))
        new.meta = dict(linear.node.meta)
    linear.node.replace_all_uses_with(new)
    erase_upstream(linear.node)
