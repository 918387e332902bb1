"""lower_routed_ffn: in Dynamo's graph, a hard gate's region becomes one op.

    before:  s = linear(x.float(), Wr, br); h = silu(linear(x, Wg)) * linear(x, Wu); y = linear(gate(h, s, t), Wd)
    after:   y = ltepass::routed_ffn(x, Wr, br, t, Wu, None, Wg, None, Wd, None, "silu")

A proxy's scores are one node, ltepass::proxy_scores; the region becomes ltepass::routed_proxy_ffn with its arguments.
Where up and gate read cut_inputs(x, c), c becomes an argument of the op; so does a cut of the gate.

Legal because the op is defined as just this (kernels/reference.py), the region is proved by the same matcher that found
the FFN, and nothing outside it reads the hidden units. A region that does not match stays masked-dense, which is exact;
the reason is returned as a value. The graph's other nodes are untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ltepass.kernels.weight_formats import Parts, lies_by_input
from ltepass.passes.find.match import Miss, Region, Rows, down_rows, match_down
from ltepass.passes.graph.edit import erase_upstream, transposed
from ltepass.passes.graph.leaves_and_linears import Flow, parameters
from ltepass.passes.graph.node_kinds import is_gate, is_input_cut, is_proxy, shape, value
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.passes.graph.walk import strip_identity
from ltepass.passes.lower.lowered_forward import fits, is_whole
from ltepass.passes.lower.why_not_ffn import why_not_region


@dataclass(frozen=True, kw_only=True)
class LowerRoutedFFN:
    name: str = "lower_routed_ffn"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        gm = job.gm
        flow = Flow(gm, parameters(gm))
        matches = [match_down(flow, linear) for linear in map(flow.linear, list(flow.nodes())) if linear is not None]
        regions = {m.gate_op: m for m in matches if isinstance(m, Region) and m.gate_op is not None}
        misses = {m.gate_op: m for m in matches if isinstance(m, Miss) and m.gate_op is not None}
        # From the last one: lowering replaces a region's result, which the next FFN may read as it is.
        for gate in reversed([n for n in flow.nodes() if is_gate(n)]):
            region = regions.get(gate)
            if region is None:
                miss = misses.get(gate)
                job.notes[router_path(gate)] = miss.reason if miss else "no down projection reads the gate"
                continue
            reason = _why_not_codes(region, job.codes) or _lower(flow, region)
            job.lowered += reason is None
            job.notes |= {} if reason is None else {router_path(gate): reason}
        job.notes = dict(reversed(job.notes.items()))
        gm.recompile()
        return f"{job.lowered} regions lowered" if job.lowered else "unchanged"


def holds_ffn(gm: GraphModule) -> bool:
    """Whether the graph has an FFN at all, gated or not."""
    flow = Flow(gm, parameters(gm))
    return any(isinstance(match_down(flow, x), Region) for x in map(flow.linear, list(flow.nodes())) if x is not None)


def router_path(gate: Node) -> str:
    """Path of a gate's router in the module that Dynamo traced; the gate's own name where Dynamo does not say."""
    scores = gate.args[1]
    assert isinstance(scores, Node)
    stack = list((scores.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^L\['\w+'\]\.?", "", stack[-1][0]) if stack else gate.name


@dataclass(frozen=True)
class _Router:
    """What decides, the input that it reads, and the op that takes its operands."""

    x: Node
    operands: tuple[Argument, ...]
    op: torch._ops.OpOverload


def _router(flow: Flow, scores: Argument) -> _Router | None:
    """What gives a gate its scores, in operands of the sparse op; None for anything that no op knows."""
    assert isinstance(scores, Node)
    scores = strip_identity(scores)
    if is_proxy(scores):
        x, *operands, _ = scores.args
        assert isinstance(x, Node)
        return _Router(x, tuple(operands), torch.ops.ltepass.routed_proxy_ffn.default)
    linear = flow.linear(scores)
    if linear is None or linear.out_dim != 0:
        return None
    return _Router(linear.x, (linear.weight, _leaf(flow, linear.bias)), torch.ops.ltepass.routed_ffn.default)


def _why_not_codes(region: Region, codes: Mapping[str, Parts]) -> str | None:
    """Why no sparse op reads what an FFN's leaves are to be replaced by, or None."""
    rows = [piece.rows for piece in (region.up, region.gate) if piece] + [down_rows(region.down)]
    *parts, down = (codes.get(str(r.leaf.target), ()) for r in rows)
    in_4_bits = lies_by_input(down)
    kinds = {len(p) for p in parts}
    if kinds == {0} and not down:
        return None
    if 0 in kinds or not down:
        return "some of its weights are in codes, and not all"
    if kinds != {3 if in_4_bits else 2}:
        return "some of its codes have 4 bits, and not all"
    if any(minimum is not None for p in parts for minimum in p[2:]):
        return "no sparse op reads blocks with a minimum"
    by_input = region.down.out_dim != 0 or any(r.dim != 0 for r in rows[:-1])
    return "its codes have a scale an input" if by_input else None


def _lower(flow: Flow, region: Region) -> str | None:
    """Rewrite one region, or say why not."""
    gate, up, down = region.gate_op, region.up.linear, region.down
    assert gate is not None
    _, scores, threshold, soft, *cuts = gate.args
    x = up.x
    if is_input_cut(region.x):
        cuts = [cuts[0] if cuts else None, region.x.args[1]]
    router = _router(flow, scores)
    reason = why_not_region(region, router.x if router else None, bool(soft))
    if reason is not None:
        return reason
    assert router is not None
    graph = flow.gm.graph
    if is_input_cut(region.x):  # only this region reads it, and goes
        source = region.x.all_input_nodes[0]
        x = source if x is region.x else x
        region.x.replace_all_uses_with(source)
        graph.erase_node(region.x)
    with graph.inserting_before(down.node):

        def operand(rows: Rows | None) -> Node | None:
            return None if rows is None else _operand(flow, rows, region.d_ff)

        args = (
            x,
            *router.operands,
            threshold,
            operand(region.up.rows),
            operand(region.up.bias),
            operand(region.gate.rows) if region.gate else None,
            operand(region.gate.bias) if region.gate else None,
            down.weight if down.out_dim == 0 else transposed(flow.gm, down.weight),
            down.bias,
            region.activation,
            *cuts,
        )
        new = graph.call_function(router.op, args)
        new.meta = dict(down.node.meta)
    down.node.replace_all_uses_with(new)
    erase_upstream(down.node)
    return None


def _leaf(flow: Flow, node: Node | None) -> Node | None:
    leaf = None if node is None else flow.leaf(node)
    return node if leaf is None else leaf[0]


def _operand(flow: Flow, rows: Rows, d_ff: int) -> Node:
    """An operand of the sparse op: the leaf itself where all of it is wanted, else a view of it, neurons first."""
    node = rows.leaf if rows.dim == 0 else transposed(flow.gm, rows.leaf)
    if is_whole(rows.step, shape(node)[0], d_ff):
        return node
    stop = rows.start + (d_ff - 1) * rows.step + 1
    args = (node, 0, rows.start, stop, rows.step)
    new = flow.gm.graph.call_function(torch.ops.aten.slice.Tensor, args)
    new.meta["example_value"] = value(node)[rows.start : stop : rows.step]
    if fits(value(new)):
        return new
    dense = flow.gm.graph.call_function(torch.ops.aten.contiguous.default, (new,))
    dense.meta["example_value"] = value(new).contiguous()
    return dense
