"""quantise_routed_ffn: a sparse op's weights become codes of 8 or 4 bits, and the op one that reads them.

    before:  y = ltepass::routed_ffn(x, Wr, br, t, Wu, bu, Wg, bg, Wd, bd, "silu")
    after:   y = ltepass::routed_ffn_int8(x, Cr, sr, br, t, Cu, bu, Cg, bg, Cd, bd, su, sg, sd, "silu")

The same for a proxy's op, whose router holds codes already and stays; in 4 bits the op is routed_ffn_int4, and down is
stored a row a neuron: [d_ff, d_out / 2]. Not the same numbers: that is what was asked for, and what they mean stands in
kernels/routed_codes_reference.py. Codes of down lie a neuron after the other, those of the others a row an output, as
the op reads them. They are new leaves, so this is for a graph that is being exported. Where the job has an FFN's codes
already, they are taken as they stand, whatever is asked of others. Of blocks with a minimum no sparse op reads weights:
such FFNs stay in floats, and the pass says so.
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
from ltepass.kernels.routed_schema import LINEAR, PROXY, op_in_codes
from ltepass.kernels.weight_formats import (
    BLOCK,
    Format,
    SparseFormat,
    int4_rows,
    int8_columns,
    int8_rows,
    lies_by_input,
    sparse_format,
)
from ltepass.passes.graph.edit import add_leaf, erase_upstream, once_a_tensor
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import is_movement, op_name, tensor_inputs
from ltepass.passes.graph.pipeline import GraphJob, Tier, told
from ltepass.passes.graph.run_node import call
from ltepass.routed.torchao_weights import Coded

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
            coded = read.held(node)
            if self.format is None and coded is None:
                continue
            format = coded or sparse_format(self.format)
            reason = _quantise(job.gm, node, read, format) if format else "only int8 and int4 are read by a sparse op"
            done += reason is None
            left.update([] if reason is None else [reason])
        job.gm.recompile()
        return told(done, "quantised", left, what="FFNs")


class _Reader:
    """Codes and scales of the ops' weights: the job's own where it has them, others rounded; once a weight."""

    def __init__(self, job: GraphJob) -> None:
        self.gm, self.codes = job.gm, job.codes
        self.rounded: dict[tuple[SparseFormat, bool], Callable[[Tensor], Coded]] = {
            ("int8", False): once_a_tensor(int8_rows),
            ("int8", True): once_a_tensor(int8_columns),
            ("int4", False): once_a_tensor(int4_rows),
            ("int4", True): once_a_tensor(lambda down: int4_rows(down.t())),
        }
        self.by_neuron = once_a_tensor(lambda codes: codes.t().contiguous().t())

    def held(self, node: Node) -> SparseFormat | None:
        """In which format the job has codes of an op's weights; None where it has none."""
        leaves = [str(leaf.target) for leaf in map(_leaf, node.all_input_nodes) if leaf is not None]
        parts = [self.codes[leaf] for leaf in leaves if leaf in self.codes]
        return None if not parts else "int4" if any(map(lies_by_input, parts)) else "int8"

    def __call__(self, node: Argument, format: SparseFormat, *, columns: bool) -> Coded | str:
        """Or why not. columns: of down, an input after the other."""
        leaf = _leaf(node)
        if leaf is None:  # nor a view of one
            return "a weight that is no leaf of the graph's own"
        parts = self.codes.get(str(leaf.target))
        if parts is None:
            weight = _seen(node, held(self.gm, leaf))
            if format == "int4" and weight.shape[0 if columns else 1] % BLOCK:
                return f"{'d_out' if columns else 'd_model'} is no multiple of {BLOCK}"
            return self.rounded[format, columns](weight)
        codes, scale = parts[:2]
        assert codes is not None, "of each format"
        assert scale is not None, "of each format"
        if format == "int4":
            return (codes, scale) if columns else (_seen(node, codes).contiguous(), _seen(node, scale).contiguous())
        scales = _seen(node, scale[:, None].expand_as(codes))
        assert bool((scales == scales[:, :1]).all()), "lower_routed_ffn left it where a scale is an input's"
        codes = _seen(node, codes)
        return self.by_neuron(codes) if columns else codes.contiguous(), scales[:, 0].contiguous()


def _quantise(gm: GraphModule, node: Node, read: _Reader, format: SparseFormat) -> str | None:
    """Replace one op, or say why not."""
    op = _OPS[str(op_name(node))]
    args = list(node.args)
    at = {"router": 1} if op is LINEAR else {}
    at |= {name: 1 + op.n_router + i for name, i in (("up", 1), ("gate", 3), ("down", 5))}
    weights: dict[str, Coded | None] = {}
    for name, i in at.items():
        parts = (
            None if args[i] is None else read(args[i], "int8" if name == "router" else format, columns=name == "down")
        )
        if isinstance(parts, str):
            return parts
        weights[name] = parts
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
        target = op_in_codes(format, proxied=op is PROXY)
        new = gm.graph.call_function(getattr(torch.ops.ltepass, target.name).default, tuple(args))
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
