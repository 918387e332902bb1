"""The start of proxy routers: nothing is regressed, since they hold what they are to predict.

Codes are made of the weights as they are, and one dense pass says in which unit a site's scores are logits: their
quartiles are LOGIT_IQR apart, so that a sigmoid is neither flat nor a step. Thresholds are placed as for any router.
With budget "model" sites compete: the loss's own metric stands for |down_j|, a site's scores mean what leaving an
expert out costs, and all have one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ltepass.calibration.energy import MAX_LOG_OFFSET, down_energy
from ltepass.calibration.sensitivity import Sensitivity
from ltepass.errors import ShardedError
from ltepass.routed.batches import Batch, require_finite
from ltepass.routed.proxy_router import ProxyRouter, encode
from ltepass.routed.quantile_table import quantiles, table_of
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import Reservoir
from ltepass.routed.sites import FFNSite
from ltepass.routed.tiered_router import TieredRouter, encode_planes
from ltepass.routed.undo import keep
from ltepass.routed.watching import Observer, watch
from ltepass.sparsity.thresholds import table_tokens

LOGIT_IQR = 2.7  # between the quartiles of the starting logits: what a normal distribution of deviation 2 has


class _Scores(Observer):
    """A sample of one site's scores in a dense pass."""

    def __init__(self, site: FFNSite, router: Router) -> None:
        super().__init__(site, router)
        self.kept = Reservoir(table_tokens(site.n_experts))

    def on_input(self, x: Tensor) -> None:
        self.kept.add(self.router.logits(x.float()))


def fresh_proxies(routed: Routed, found: dict[str, Sensitivity] | None) -> None:
    """Proxies as they were made, of what the weights are now; scores are in the FFN's own unit. found: of budget
    "model".
    """
    for site, router in routed:
        assert isinstance(router, ProxyRouter)
        done = encode(routed.model, site, router)
        if isinstance(router, TieredRouter):
            done = done and encode_planes(routed.model, site, router)
        if not done:
            raise ShardedError(
                f"{site.name}: its weights are no whole parameters of the model any more (an adapter or a shard holds "
                "them), and a proxy is made of them; call ltepass.calibrate(model, batches) before wrapping"
            )
        keep(router.weight, router.bias)
        with torch.no_grad():
            router.weight.fill_(1.0)
            router.bias.zero_()
        neurons = down_energy(routed.model, site) if found is None else found[site.name].neurons
        router.sizes.copy_(neurons.sqrt())


def scale_proxies(routed: Routed, batches: Sequence[Batch], found: dict[str, Sensitivity] | None) -> None:
    """Sizes and tables of fresh ones; thresholds stay for the caller."""
    observers = [_Scores(site, router) for site, router in routed]
    watch(routed, batches, observers)
    samples = {o.site.name: o.kept.rows() for o in observers}
    for name, scores in samples.items():
        require_finite(name, scores)
    factors = dict.fromkeys(samples, 1.0)
    if found is not None:
        factors = {name: _factor(found[name].log_cost, scores) for name, scores in samples.items()}
    spreads = {name: factors[name] * _spread(scores) for name, scores in samples.items()}
    if found is not None:
        spreads = dict.fromkeys(spreads, math.exp(sum(map(math.log, spreads.values())) / len(spreads)))
    for site, router in routed:
        scale = factors[site.name] * LOGIT_IQR / spreads[site.name]
        router.sizes.mul_(scale)  # type: ignore[operator]
        router.quantiles.copy_(table_of(samples[site.name]) * scale)


def _spread(scores: Tensor) -> float:
    """Between the quartiles; of experts that are mostly 0, as a ReLU leaves them, the mean; 1 where all are."""
    low, high = quantiles(scores.flatten(), scores.new_tensor([0.25, 0.75])).tolist()
    usual = high - low or float(scores.mean())
    return usual if math.isfinite(usual) and usual > 0 else 1.0


def _factor(log_cost: float, scores: Tensor) -> float:
    """What makes the mean of log score^2, of the scores that are not 0, the site's log cost."""
    logs = 2 * scores[scores > 0].double().log()
    offset = log_cost - float(logs.mean()) if logs.numel() else 0.0
    return math.exp(min(max(offset, -MAX_LOG_OFFSET), MAX_LOG_OFFSET) / 2)
