"""lay_out_neurons: what the sparse op gathers is stored so that it lies together.

    before:  y = ltepass::routed_ffn(x, ..., down, ...), down [d_model, d_ff] stored a row an output
    after:   the same, down stored a neuron after the other; up and gate an input after the other where inputs are cut

Legal because shapes and numbers are the same, only strides differ. The weight is a new one, so this is for a graph that
has its weights to itself: one that is being exported. `ltepass.lower` does the same to a model's own parameters
(`lay_out`), and `ltepass.unlower` lays them as they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ltepass.passes.graph.edit import add_leaf
from ltepass.passes.graph.leaves_and_linears import held
from ltepass.passes.graph.node_kinds import op_name
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.routed.routed import Routed
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import lay_as


@dataclass(frozen=True, kw_only=True)
class LayOutNeurons:
    name: str = "lay_out_neurons"
    tier: Tier = "exact"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        stored = 0
        for node in list(job.gm.graph.nodes):
            if op_name(node) in ("routed_ffn", "routed_proxy_ffn"):
                stored += sum(_store(job, node, name) for name in _gathered(node))
        job.gm.recompile()
        return f"{stored} weights stored otherwise" if stored else "unchanged"


def _gathered(node: Node) -> tuple[str, ...]:
    """Names of the weights whose columns the op gathers."""
    return ("down",) if _argument(node, "input_cut") is None else ("down", "up", "gate")


def _argument(node: Node, name: str) -> Node | None:
    place = _place(node, name)
    value = node.args[place] if place < len(node.args) else None
    return value if isinstance(value, Node) else None


def _place(node: Node, name: str) -> int:
    assert isinstance(node.target, torch._ops.OpOverload), "one of our ops"
    return [argument.name for argument in node.target._schema.arguments].index(name)


def _store(job: GraphJob, node: Node, name: str) -> bool:
    """Whether the weight is a leaf whose columns do not lie together yet, and does now."""
    leaf = _argument(node, name)
    if leaf is None or leaf.op != "get_attr" or held(job.gm, leaf).stride(0) == 1:
        return False
    with job.gm.graph.inserting_before(node):
        columns = held(job.gm, leaf).t().contiguous().t()
        new = add_leaf(job.gm, f"{str(leaf.target).replace('.', '_')}_by_column", columns)
    node.update_arg(_place(node, name), new)
    if not leaf.users:
        job.gm.graph.erase_node(leaf)
    return True


def lay_out(routed: Routed, site: FFNSite) -> dict[str, tuple[int, ...]]:
    """Store what the kernel gathers so that it is contiguous: same logical shape, no copy kept.

    That is a neuron; of up and gate an input, where small inputs are left out. Returns the strides that were, by name.
    """
    before = {}
    by_input = routed.router(site).input_cut is not None
    wanted = {site.down_rows: site.down_rows.dim}
    wanted |= {rows: 1 - rows.dim if by_input else rows.dim for rows in (site.up_rows, site.gate_rows) if rows}
    for rows, contiguous_along in wanted.items():
        parameter = routed.model.get_parameter(rows.param)
        if contiguous_along == 1 and parameter.device.type == "cpu" and not parameter.is_meta:
            before[rows.param] = parameter.stride()
            parameter.data = parameter.data.t().contiguous().t()
    return before


def give_back_strides(routed: Routed) -> None:
    """Strides as before `lay_out`, of weights that still lie as it stored them: others were replaced meanwhile."""
    parameters = dict(routed.model.named_parameters(remove_duplicate=False))
    for name, stride in routed.state.strides.items():
        parameter = parameters.get(name)
        if parameter is not None and parameter.dim() == 2 and parameter.t().is_contiguous():
            lay_as(parameter, stride)
    routed.state.strides = {}
