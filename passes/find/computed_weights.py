"""FFNs with a linear whose weight is computed at each call (weight norm, spectral norm, pruning). Found to be refused.

Such a weight is made of parameters by arithmetic (v * g / |v|): it has no rows of its own that a gate, the op or a
checkpoint could name. Two products with elementwise operations and an activation between them are an FFN.
"""

from __future__ import annotations

from torch.fx import Node

from ltepass.passes.find.region_checks import MAX_REGION
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Flow, linear_parts
from ltepass.passes.graph.node_kinds import (
    is_movement,
    is_nonlinear,
    is_plain_tensor,
    is_pointwise,
    op_name,
    shape,
    tensor_inputs,
)
from ltepass.passes.graph.walk import breadth_first, strip_identity
from ltepass.routed.sites import Refusal

_PICKING = frozenset("getitem index index_select gather embedding take_along_dim".split())


def refuse_computed_weights(captured: Captured) -> list[Refusal]:
    """A refusal for each linear of an FFN whose weight is computed at each call, under its own name."""
    flow = captured.flow
    computed = {n: weight for n in flow.nodes() if (weight := _computed_weight(flow, n)) is not None}
    if not computed:
        return []
    found: dict[Node, None] = {}
    for node in flow.nodes():
        ups = _products_behind(flow, node, computed)
        found |= {n: None for n in (*ups, node) if ups and n in computed}
    return [
        Refusal(
            module=captured.stack(node)[-1],
            node=node.name,
            check="weight",
            reason=f"its weight is no parameter: {op_name(computed[node])} computes it at each call, as weight norm "
            "and pruning do; make it a parameter (parametrize.remove_parametrizations, prune.remove of torch.nn.utils)",
        )
        for node in found
    ]


def _computed_weight(flow: Flow, node: Node) -> Node | None:
    """The weight of a product whose weight is computed from parameters alone, and is not one of them."""
    parts = linear_parts(node)
    weight = parts[1] if parts else None
    if not isinstance(weight, Node) or not is_plain_tensor(weight) or len(shape(weight)) != 2:
        return None
    source = strip_identity(weight)
    while source not in flow.leaves and (is_movement(source) or op_name(source) in _PICKING):
        source = strip_identity(tensor_inputs(source)[0])
    return source if source not in flow.leaves and flow.fixed(weight) else None


def _products_behind(flow: Flow, node: Node, computed: dict[Node, Node]) -> list[Node]:
    """The products that feed this one through elementwise operations alone, with an activation among them, or none."""
    product = flow.product(node)
    if product is None and node not in computed:
        return []
    ups: list[Node] = []
    inner: set[Node] = set()
    start = product.x if product else tensor_inputs(node)[0]
    for source in breadth_first(start, lambda n: tensor_inputs(n) if n in inner else ()):
        if source in computed or flow.product(source) is not None:
            ups.append(source)
        elif flow.fixed(source):
            continue
        elif not (is_pointwise(source) or is_movement(source)) or len(inner) == MAX_REGION:
            return []
        else:
            inner.add(source)
    return ups if any(map(is_nonlinear, inner)) else []
