"""quantise_routed_ffn: a sparse op's weights become int8 codes with a scale an output, and the op one that reads them.

    before:  y = ltepass::routed_ffn(x, Wr, br, t, Wu, bu, Wg, bg, Wd, bd, "silu")
    after:   y = ltepass::routed_ffn_int8(x, Cr, sr, br, t, Cu, bu, Cg, bg, Cd, bd, su, sg, sd, "silu")

The same for a proxy's op, whose router holds codes already and stays. Not the same numbers: that is what was asked for;
kernels/routed_codes_reference.py says what they mean. Codes of down lie a neuron after the other, those of the others a
row an output, as the op reads them. They are new leaves, so this is for a graph that is being exported. Where the job
has an FFN's codes already, they are taken as they stand, whatever is asked of others. Of 4 bits no sparse op reads
weights: such FFNs stay in floats, and the pass says so.
"""

from __future__ import annotations

from collections import Counter
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

Int8 = tuple[Tensor, Tensor]
_OPS = {op.name: op for op in (LINEAR, PROXY)}


@dataclass(frozen=True, kw_only=True)
class QuantiseRoutedFFN:
    format: Format | None = None  # None quantises nothing itself
    name: str = "quantise_routed_ffn"
    tier: Tier = "quantised"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        done, left, read = 0, Counter[str](), _Reader(job)
        for node in [n for n in job.gm.graph.nodes if op_name(n) in _OPS]:
            coded = read.has_codes(node)
            if self.format is None and not coded:
                continue
            reason = _quantise(job.gm, node, read) if coded or self.format == "int8" else "no sparse op reads 4 bits"
            done += reason is None
            left.update([] if reason is None else [reason])
        job.gm.recompile()
        return told(done, "quantised", left, what="FFNs")


class _Reader:
    """Codes and scales of the ops' weights: the job's own where it has them, others rounded; once a weight."""

    def __init__(self, job: GraphJob) -> None:
        self.gm, self.codes = job.gm, job.codes
        self.rows, self.columns = once_a_tensor(int8_rows), once_a_tensor(int8_columns)
        self.by_neuron = once_a_tensor(lambda codes: codes.t().contiguous().t())

    def has_codes(self, node: Node) -> bool:
        """Whether the job has those of any of an op's weights."""
        return any(str(leaf.target) in self.codes for leaf in map(_leaf, node.all_input_nodes) if leaf is not None)

    def __call__(self, node: Argument, *, columns: bool) -> Int8 | None:
        """None for what is no leaf, nor a view of one. columns: codes an input after the other."""
        leaf = _leaf(node)
        if leaf is None:
            return None
        parts = self.codes.get(str(leaf.target))
        if parts is None:
            return (self.columns if columns else self.rows)(_seen(node, held(self.gm, leaf)))
        codes, scale = parts
        assert codes is not None, "of int8"
        assert scale is not None, "of int8"
        scales = _seen(node, scale[:, None].expand_as(codes))
        assert bool((scales == scales[:, :1]).all()), "lower_routed_ffn left it where a scale is an input's"
        codes = _seen(node, codes)
        return self.by_neuron(codes) if columns else codes.contiguous(), scales[:, 0].contiguous()


def _quantise(gm: GraphModule, node: Node, read: _Reader) -> str | None:
    """Replace one op, or say why not."""
    op = _OPS[str(op_name(node))]
    args = list(node.args)
    at = {"router": 1} if op is LINEAR else {}
    at |= {name: 1 + op.n_router + i for name, i in (("up", 1), ("gate", 3), ("down", 5))}
    weights = {name: None if args[i] is None else read(args[i], columns=name == "down") for name, i in at.items()}
    if any(weights[name] is None and args[i] is not None for name, i in at.items()):
        return "a weight that is no leaf of the graph's own"
    scales: dict[str, Argument] = {}
    with gm.graph.inserting_before(node):
        for name, parts in weights.items():
            source = args[at[name]]
            args[at[name]], scales[name] = (
                None if t is None else add_leaf(gm, f"{source}_{part}", t)
                for part, t in zip(("neuron_codes", "neuron_scale"), parts or (None, None), strict=True)
            )
        args[op.n_tensors : op.n_tensors] = [scales[name] for name in ("up", "gate", "down")]
        if op is LINEAR:
            args.insert(2, scales["router"])
        new = gm.graph.call_function(getattr(torch.ops.ltepass, f"{op.name}_int8").default, tuple(args))
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    erase_upstream(node)
    return None


def _leaf(node: Argument) -> Node | None:
    """The leaf that a node is, or is a view of; None for anything else."""
    while isinstance(node, Node) and node.op != "get_attr":
        node = tensor_inputs(node)[0] if is_movement(node) and len(node.all_input_nodes) == 1 else None
    return node if isinstance(node, Node) else None


def _seen(node: Argument, tensor: Tensor) -> Tensor:
    """What a view of a leaf sees where the leaf holds this."""
    assert isinstance(node, Node), "it has a leaf"
    if node.op == "get_attr":
        return tensor
    view = call(node, (_seen(tensor_inputs(node)[0], tensor), *node.args[1:]), dict(node.kwargs))
    assert isinstance(view, Tensor), "a movement gives one"
    return view
