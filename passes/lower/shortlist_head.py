"""shortlist_head: of a head in int8, a token reads 4 bits of all rows, and 8 of the rows that these say are the best.

    before:  logits = ltepass::linear_int8(x, codes, scale, b)
    after:   logits = ltepass::linear_shortlist(x, codes, scale, scan_codes, scan_scale, rows, b)

Not the same numbers: that is what was asked for. The largest logits are those of before, unless 4 bits place one of
them behind `rows` others; all others are of 4 bits (kernels/linear_reference.py). The head is the linear that the
graph's output is made of, by what moves numbers or changes each by itself. The 4-bit codes are new leaves, so this is
for a graph that has its weights to itself: one that is being exported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ltepass.kernels import shortlist as _shortlist  # noqa: F401 -- registers the op that the pass emits
from ltepass.kernels.weight_formats import BLOCK, dequantise_int8, int4_rows
from ltepass.passes.graph.edit import add_leaf, erase_upstream
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import is_movement, is_pointwise, op_name, shape
from ltepass.passes.graph.pipeline import GraphJob, Tier

HEAD = "head"  # in the job's notes: why there is no shortlist


@dataclass(frozen=True, kw_only=True)
class ShortlistHead:
    rows: int | None = None  # None changes nothing
    name: str = "shortlist_head"
    tier: Tier = "quantised"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        if self.rows is None:
            return "unchanged"
        head = _head(job.gm)
        reason = "no linear in int8 makes the output" if head is None else _why_not(head)
        if head is None or reason is not None:
            job.notes[HEAD] = str(reason)
            return "unchanged"
        x, codes, scale, *bias = head.args
        assert isinstance(codes, Node), "a leaf"
        assert isinstance(scale, Node), "a leaf"
        scan = int4_rows(dequantise_int8(held(job.gm, codes), held(job.gm, scale)))
        with job.gm.graph.inserting_before(head):
            parts = [add_leaf(job.gm, f"{codes.target}_scan_{i}", tensor) for i, tensor in enumerate(scan)]
            args = (x, codes, scale, *parts, self.rows, *bias)
            new = job.gm.graph.call_function(torch.ops.ltepass.linear_shortlist.default, args)
            new.meta = dict(head.meta)
        head.replace_all_uses_with(new)
        erase_upstream(head)
        job.gm.recompile()
        return f"{self.rows} of {shape(codes)[0]} rows in 8 bits"


def _head(gm: GraphModule) -> Node | None:
    (output,) = gm.graph.find_nodes(op="output")
    (node, *others) = output.all_input_nodes
    while not others and op_name(node) != "linear_int8":
        streams = [n for n in node.all_input_nodes if n.op not in ("get_attr", "placeholder")]
        if len(streams) != 1 or not (is_movement(node) or is_pointwise(node)):
            return None
        node = streams[0]
    return None if others else node


def _why_not(head: Node) -> str | None:
    codes, scale = head.args[1:3]
    if not all(isinstance(leaf, Node) and leaf.op == "get_attr" for leaf in (codes, scale)):
        return "its codes are no leaves of the graph's own"
    return f"d_in is no multiple of {BLOCK}" if shape(codes)[1] % BLOCK else None  # type: ignore[arg-type]  # a node
