"""pack_tiers: an FFN's planes of bits are stored as a kernel reads them, and its op is one that reads them so.

    before:  y = ltepass::tiered_ffn(x, codes, ..., t, floor, down codes, ..., low codes, ..., bd, "silu")
    after:   y = ltepass::packed_tiered_ffn(x, high, low, biases, sizes, Wr, br, t, floor, bd, "silu")

Legal because the op is defined as that of the planes that were packed (kernels/packed_planes.py); sums are taken in
another order. What is packed is a new leaf, so this is for a graph that has its weights to itself: one that is being
exported. `ltepass.lower` does the same for a model's own routers (`TieredRouter.packed`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ltepass.kernels import packed_planes, tiers
from ltepass.kernels import packed_tiers as _packed_tiers  # noqa: F401 -- registers the op that the pass emits
from ltepass.kernels.packed_planes import Packed
from ltepass.kernels.tiers_reference import planes_of
from ltepass.passes.graph.edit import add_leaf, erase_upstream
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import op_name
from ltepass.passes.graph.pipeline import GraphJob, Tier


@dataclass(frozen=True, kw_only=True)
class PackTiers:
    name: str = "pack_tiers"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        made: dict[tuple[int, ...], Packed] = {}  # by where planes lie: FFNs that share them share what is packed
        packed = sum(_pack(job, node, made) for node in list(job.gm.graph.nodes) if op_name(node) == "tiered_ffn")
        job.gm.recompile()
        return f"{packed} FFNs packed" if packed else "unchanged"


def _pack(job: GraphJob, node: Node, made: dict[tuple[int, ...], Packed]) -> bool:
    """Whether the planes are leaves, and the op reads them packed now."""
    call = tiers.call(node.args)
    leaves = [leaf for codes in call.planes[:3] for leaf in codes]
    if not all(isinstance(leaf, Node) and leaf.op == "get_attr" for leaf in leaves):
        return False
    tensors = [held(job.gm, leaf) for leaf in leaves]  # type: ignore[arg-type]  # nodes stand for tensors
    key = tuple(tensor.data_ptr() for tensor in tensors)
    if key not in made:
        made[key] = packed_planes.pack(planes_of(tensors))
    router = call.deciding
    with job.gm.graph.inserting_before(node):
        both = [add_leaf(job.gm, f"{leaves[0]}_{part}", t) for part, t in made[key]._asdict().items()]
        rest = (router.proxy.biases, router.proxy.sizes, router.weight, router.bias)
        args = (call.x, *both, *rest, call.threshold, call.floor, call.down_bias, router.activation)
        new = job.gm.graph.call_function(torch.ops.ltepass.packed_tiered_ffn.default, args)
        new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    erase_upstream(node)
    return True
