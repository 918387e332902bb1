"""merge_linears: linears that read the same input become one, whose weight holds the rows of all.

    before:  q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv)
    after:   y = linear(x, [Wq; Wk; Wv]); q = y[..., :a]; k = y[..., a:b]; v = y[..., b:]

Legal because each output is the product of its own row with the same x, whichever rows stand around it. The merged
weight is a new one, so this is for a graph that has its weights to itself: one that is being exported. One call reads
what three did. Linears with and without bias stay apart, and so do those in codes; routers' stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ltepass.kernels.weight_formats import Parts
from ltepass.passes.graph.edit import add_leaf, erase_upstream
from ltepass.passes.graph.leaves_and_linears import Flow, Linear, held, parameters
from ltepass.passes.graph.node_kinds import value
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.passes.lower.why_not_linear import read_linears


@dataclass(frozen=True, kw_only=True)
class MergeLinears:
    name: str = "merge_linears"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        flow = Flow(job.gm, parameters(job.gm))
        groups: dict[tuple[Node, bool, tuple[bool, ...]], list[Linear]] = {}
        for linear, reason in read_linears(flow):
            own = linear.weight.op == "get_attr" and (linear.bias is None or linear.bias.op == "get_attr")
            if reason is None and own:
                kind = tuple(part is None for part in _codes(job, linear))
                groups.setdefault((linear.x, linear.bias is None, kind), []).append(linear)
        merged = [group for group in groups.values() if len(group) > 1]
        for number, group in enumerate(merged):
            _merge(job, group, f"merged_{number}")
        job.gm.recompile()
        return f"{sum(map(len, merged))} linears became {len(merged)}" if merged else "unchanged"


def _codes(job: GraphJob, linear: Linear) -> Parts:
    """A linear's codes, a row an output; none where it has floats."""
    return job.codes.get(str(linear.weight.target), ()) if linear.out_dim == 0 else ()


def _merge(job: GraphJob, group: list[Linear], name: str) -> None:
    """One linear for a group that reads one input, and the parts of its output in their places."""
    gm, first = job.gm, group[0]
    parts = zip(*(_codes(job, linear) for linear in group), strict=True)
    codes = tuple(None if part[0] is None else torch.cat(part) for part in parts)
    job.codes |= {f"{name}_weight": codes} if codes else {}
    with gm.graph.inserting_before(first.node):
        weight = add_leaf(gm, f"{name}_weight", torch.cat([_rows(gm, linear) for linear in group]))
        biases = [linear.bias for linear in group if linear.bias is not None]
        bias = add_leaf(gm, f"{name}_bias", torch.cat([held(gm, b) for b in biases])) if biases else None
        whole = gm.graph.call_function(torch.ops.aten.linear.default, (first.x, weight, bias))
        whole.meta["val"] = _widened(value(first.node), sum(linear.width for linear in group))
        ends = list(accumulate(linear.width for linear in group))
        for linear, end in zip(group, ends, strict=True):
            part = gm.graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, end - linear.width, end))
            part.meta = dict(linear.node.meta)
            linear.node.replace_all_uses_with(part)
    for linear in group:
        erase_upstream(linear.node)


def _rows(gm: GraphModule, linear: Linear) -> Tensor:
    weight = held(gm, linear.weight)
    return weight if linear.out_dim == 0 else weight.t()


def _widened(y: Tensor, width: int) -> Tensor:
    return y.new_empty((*y.shape[:-1], width))
