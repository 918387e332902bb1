"""quantise_linears: a plain linear's weight becomes codes of 8 or 4 bits, and the linear the op that reads them.

    before:  e = embedding(T, ids); y = linear(x, W, b)
    after:   e = embedding_int8(ids, codes, scale); y = ltepass::linear_int8(x, codes, scale, b)          bits = 8
             the same with int4, and `minimum` behind the scale, which is None where it is not asked for   bits = 4

Not the same numbers: that is what was asked for. kernels/linear_reference.py says what each means. The codes are new
leaves, so this is for a graph that has its weights to itself: one that is being exported. A table of tokens has its
codes from the same rule, and shares them with a head that it is tied to. Routers that score for a gate stay
as they are; so do tables of positions, which are small, and rows that no block of 32 divides. Sparse ops have a pass
of their own, quantise_routed_ffn. Where the job has a weight's codes already, they are taken as they stand, whatever is
asked of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ltepass.kernels import linear as _linear  # noqa: F401 -- registers the ops that the pass emits
from ltepass.kernels.linear import FLOATS
from ltepass.kernels.linear_reference import embedding_int4, embedding_int8
from ltepass.kernels.weight_formats import BLOCK, Parts, lies_by_input, quantise, takes
from ltepass.kernels.weight_formats import Format as Format
from ltepass.passes.graph.edit import add_leaf, erase_upstream, once_a_tensor
from ltepass.passes.graph.leaves_and_linears import Flow, Linear, held, parameters
from ltepass.passes.graph.node_kinds import is_movement, shape, value
from ltepass.passes.graph.pipeline import GraphJob, Tier, told
from ltepass.passes.graph.walk import strip_identity
from ltepass.passes.lower.lower_linears import put_op
from ltepass.passes.lower.why_not_linear import read_linears

Make = Callable[[Tensor], Parts]


@dataclass(frozen=True, kw_only=True)
class QuantiseLinears:
    format: Format | None = None  # None quantises nothing itself
    name: str = "quantise_linears"
    tier: Tier = "quantised"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        if self.format is None and not job.codes:
            return "unchanged"
        flow, left = Flow(job.gm, parameters(job.gm)), Counter[str]()
        make = None if self.format is None else once_a_tensor(partial(quantise, format=self.format))
        for linear, unread in reversed(read_linears(flow)):  # a later one may read an earlier one's result as it is
            codes = job.codes.get(str(linear.weight.target))
            if codes is None and make is None:
                continue
            reason = unread or self._why_not(linear, codes)
            if reason is not None:
                left[reason] += 1
                continue
            codes = make(held(job.gm, linear.weight)) if codes is None and make else codes
            assert codes is not None, "the job's, or made"
            op = torch.ops.ltepass.linear_int8 if len(codes) == 2 else torch.ops.ltepass.linear_int4
            put_op(job.gm, linear, op.default, *self._leaves(job.gm, linear.node, linear.weight, codes))
            job.linears += 1
        if make is not None:
            for embedding in self._tables(job.gm):
                self._embed(job.gm, embedding, make)
        job.gm.recompile()
        return told(job.linears, "quantised", left)

    def _why_not(self, linear: Linear, codes: Parts | None) -> str | None:
        """What keeps a linear of the graph from being quantised, or None. codes: that it has already."""
        if linear.weight.op != "get_attr":
            return "a weight that is no leaf of the graph's own"
        if linear.out_dim != 0:
            return "a weight stored [d_in, d_out]"
        if codes is not None and lies_by_input(codes):
            return "blocks of its codes lie along outputs"
        fits = codes is not None or takes(self.format, shape(linear.weight)[1])
        return None if fits else f"d_in is no multiple of {BLOCK}"

    def _tables(self, gm: GraphModule) -> list[Node]:
        """The nodes that look tokens up: their rows are picked by an input, and not by a count of positions."""
        nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
        nodes = [n for n in nodes if _is_float_leaf(n.args[0]) and _is_input(n.args[1])]
        return [n for n in nodes if takes(self.format, shape(n.args[0])[1])]

    def _embed(self, gm: GraphModule, node: Node, make: Make) -> None:
        """Replace the look-up of tokens in a table by one in its codes."""
        table, ids = node.args[:2]
        assert isinstance(table, Node), "a leaf"
        codes = make(held(gm, table))
        parts = self._leaves(gm, node, table, codes)
        rows = embedding_int8 if len(codes) == 2 else embedding_int4
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(rows, (ids, *parts), {"dtype": value(node).dtype})
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        erase_upstream(node)

    def _leaves(self, gm: GraphModule, before: Node, weight: Node, parts: Parts) -> list[Node | None]:
        """Leaves before a node: the codes of a weight."""
        name = str(weight.target).replace(".", "_")
        with gm.graph.inserting_before(before):
            return [
                None if tensor is None else add_leaf(gm, f"{name}_{part}", tensor)
                for part, tensor in zip(("codes", "scale", "minimum"), parts, strict=False)
            ]


def _is_float_leaf(node: object) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and value(node).dtype in FLOATS


def _is_input(node: object) -> bool:
    """Whether it is one of the graph's inputs, in this shape or another: then a look-up by it is one of tokens."""
    while isinstance(node, Node) and (is_movement(node) or node is not strip_identity(node)):
        node = node.all_input_nodes[0]
    return isinstance(node, Node) and node.op == "placeholder"
