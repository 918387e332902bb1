"""quantise_routed_ffn: a sparse op's weights become int8 codes with a scale an output, and the op one that reads them.

    before:  y = ltepass::routed_ffn(x, Wr, br, t, Wu, bu, Wg, bg, Wd, bd, "silu")
    after:   y = ltepass::routed_ffn_int8(x, Cr, sr, br, t, Cu, bu, Cg, bg, Cd, bd, su, sg, sd, "silu")

The same for a proxy's op, whose router holds codes already and stays. Not the same numbers: that is what was asked for;
kernels/routed_int8_reference.py says what they mean. Codes of down lie a neuron after the other, those of the others a
row an output, as the op reads them. They are new leaves, so this is for a graph that is being exported. Of 4 bits no
sparse op reads weights: such FFNs stay in floats, and the pass says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ltepass.kernels import routed_ffn as _routed_ffn  # noqa: F401 -- registers the ops that the pass emits
from ltepass.kernels.routed_schema import LINEAR, PROXY
from ltepass.kernels.weight_formats import Format, int8_columns, int8_rows
from ltepass.passes.graph.edit import add_leaf, erase_upstream, once_a_tensor
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import is_movement, op_name, tensor_inputs
from ltepass.passes.graph.pipeline import GraphJob, Tier, told
from ltepass.passes.graph.run_node import call

Make = Callable[[Tensor], tuple[Tensor, Tensor]]
_OPS = {op.name: op for op in (LINEAR, PROXY)}


@dataclass(frozen=True, kw_only=True)
class QuantiseRoutedFFN:
    format: Format | None = None  # None quantises nothing
    name: str = "quantise_routed_ffn"
    tier: Tier = "quantised"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        if self.format is None:
            return "unchanged"
        done, left, rows, columns = 0, Counter[str](), once_a_tensor(int8_rows), once_a_tensor(int8_columns)
        for node in [n for n in job.gm.graph.nodes if op_name(n) in _OPS]:
            reason = "no sparse op reads 4 bits" if self.format != "int8" else _quantise(job.gm, node, rows, columns)
            done += reason is None
            left.update([] if reason is None else [reason])
        job.gm.recompile()
        return told(done, "quantised", left, what="FFNs")


def _quantise(gm: GraphModule, node: Node, rows: Make, columns: Make) -> str | None:
    """Replace one op, or say why not."""
    op = _OPS[str(op_name(node))]
    args = list(node.args)
    at = {"router": 1} if op is LINEAR else {}
    at |= {name: 1 + op.n_router + i for name, i in (("up", 1), ("gate", 3), ("down", 5))}
    weights = {name: None if args[i] is None else _fixed(gm, args[i]) for name, i in at.items()}
    if any(weights[name] is None and args[i] is not None for name, i in at.items()):
        return "a weight that is no leaf of the graph's own"
    scales: dict[str, Argument] = {}
    with gm.graph.inserting_before(node):
        for name, weight in weights.items():
            parts = (None, None) if weight is None else (columns if name == "down" else rows)(weight)
            source = args[at[name]]
            args[at[name]], scales[name] = (
                None if t is None else add_leaf(gm, f"{source}_{part}", t)
                for part, t in zip(("neuron_codes", "neuron_scale"), parts, strict=True)
            )
        args[op.n_tensors : op.n_tensors] = [scales[name] for name in ("up", "gate", "down")]
        if op is LINEAR:
            args.insert(2, scales["router"])
        new = gm.graph.call_function(getattr(torch.ops.ltepass, f"{op.name}_int8").default, tuple(args))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    erase_upstream(node)
    return None


def _fixed(gm: GraphModule, node: Argument) -> Tensor | None:
    """What a leaf holds, or a view of it; None for anything else."""
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        return held(gm, node)
    if not is_movement(node) or len(node.all_input_nodes) != 1:
        return None
    source = _fixed(gm, tensor_inputs(node)[0])
    seen = None if source is None else call(node, (source, *node.args[1:]), dict(node.kwargs))
    return seen if isinstance(seen, Tensor) else None
