"""lower_tiers: in a graph, an FFN whose inactive neurons keep low bits becomes one op.

    before:  s = proxy_scores(x.float(), codes, ...); y = linear(zeros_like(h), Wd, bd) + tiers(x, s, t, floor, planes)
    after:   y = ltepass::tiered_ffn(x, codes, ..., t, floor, planes, bd, "silu")

Legal because the op is defined as just this (kernels/tiers_reference.py), and zeros leave nothing of down but its bias.
What computed h goes with it. A region that does not match stays as it is, which is exact; the reason is returned as a
value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.node import Argument

from ltepass.kernels import tiers as _tiers  # noqa: F401 -- registers the op that the pass emits
from ltepass.passes.graph.edit import erase_upstream
from ltepass.passes.graph.leaves_and_linears import Flow, parameters
from ltepass.passes.graph.node_kinds import is_proxy, is_tiers, op_name, shape, value
from ltepass.passes.graph.pipeline import GraphJob, Tier
from ltepass.passes.graph.walk import consumers, strip_identity, strip_views
from ltepass.passes.lower.lower_routed_ffn import router_path
from ltepass.passes.lower.why_not_ffn import TIERS_ON_GPU

N_PROXY = 7  # operands of the scores between x and the activation
N_HIGH = 3  # planes that the scores are of


@dataclass(frozen=True, kw_only=True)
class LowerTiers:
    name: str = "lower_tiers"
    tier: Tier = "rounding"
    skippable: bool = True

    def __call__(self, job: GraphJob) -> str:
        flow = Flow(job.gm, parameters(job.gm))
        lowered = 0
        for node in [n for n in flow.nodes() if is_tiers(n)]:
            path = router_path(node)
            reason = _lower(flow, node)
            lowered += reason is None
            job.notes |= {} if reason is None else {path: reason}
        job.lowered += lowered
        job.gm.recompile()
        return f"{lowered} regions lowered" if lowered else "unchanged"


def _lower(flow: Flow, tiers: Node) -> str | None:
    """Rewrite one region, or say why not."""
    x, scores, threshold, floor, *planes, _, activation = tiers.args
    assert isinstance(x, Node)
    if value(x).device.type != "cpu":
        return TIERS_ON_GPU
    logits = strip_identity(scores) if isinstance(scores, Node) else None
    if logits is None or not is_proxy(logits) or logits.args[1 : 1 + N_HIGH] != tuple(planes[:N_HIGH]):
        return "what decides is no proxy of these planes"
    read = logits.args[0]
    assert isinstance(read, Node)
    if strip_identity(read) is not strip_identity(x):
        return "the router and the planes read different inputs"
    whole, down = _added(flow, tiers)
    linear = None if down is None else flow.linear(strip_views(down))
    if whole is None or linear is None or op_name(strip_views(linear.x)) != "zeros_like":
        return "no down projection of zeros is added to what the planes give"
    if value(whole).dtype != value(x).dtype or shape(whole) != shape(x):
        return "the FFN's output has another shape or dtype than its input"
    operands: tuple[Argument, ...] = (*logits.args[1 : 1 + N_PROXY], threshold, floor, *planes[N_HIGH:])
    with flow.gm.graph.inserting_before(whole):
        args = (x, *operands, linear.bias, activation)
        new = flow.gm.graph.call_function(torch.ops.ltepass.tiered_ffn.default, args)
        new.meta = dict(whole.meta)
    whole.replace_all_uses_with(new)
    erase_upstream(whole)
    return None


def _added(flow: Flow, tiers: Node) -> tuple[Node | None, Node | None]:
    """The addition that reads what the planes give, and its other summand."""
    node = tiers
    while True:
        users = consumers(node)
        if len(users) != 1:
            return None, None
        (user,) = users
        if op_name(user) == "add" and len(user.args) == 2 and not user.kwargs:
            others = [a for a in user.args if a is not node]
            return (user, others[0]) if len(others) == 1 and isinstance(others[0], Node) else (None, None)
        if strip_identity(user) is not strip_identity(node):
            return None, None
        node = user
