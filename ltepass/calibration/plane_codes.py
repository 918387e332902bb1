"""High codes of a quantiser that knows what a site's linears see, where the sites below are in their codes already.

The second moments of x and of the hidden units are added up in a pass: d_model^2 + d_ff^2 numbers a site. Sites are
done in their order, in turns of as many as BUDGET_BYTES holds and TURNS asks for, each turn with a pass of its own in
hard mode: sites that are done give their high plane alone, which later ones can make up for, the others both planes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ltepass.calibration.gptq import codes_along_inputs, codes_by_input
from ltepass.routed.batches import Batch
from ltepass.routed.proxy_router import encode, read_rows, read_weights
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import BUDGET_BYTES
from ltepass.routed.sites import FFNSite
from ltepass.routed.tiered_router import TieredRouter, encode_planes
from ltepass.routed.watching import Observer, watch
from ltepass.threads import one_thread

TURNS = 6

Turn = list[tuple[FFNSite, TieredRouter]]


class _Moments(Observer):
    """X^T X and H^T H of one site."""

    def __init__(self, site: FFNSite, router: Router) -> None:
        super().__init__(site, router)
        device = router.threshold.device
        self.x, self.h = (torch.zeros(n, n, dtype=torch.float32, device=device) for n in (site.d_model, site.d_ff))

    def on_input(self, x: Tensor) -> None:
        with one_thread():
            self.x.addmm_(x.float().T, x.float())

    def on_hidden(self, h: Tensor) -> None:
        with one_thread():
            self.h.addmm_(h.float().T, h.float())


def quantise_planes(routed: Routed, batches: Sequence[Batch]) -> None:
    """New planes of all sites, which have rounded ones; tables go, and thresholds stay.

    Raises CalibrationError where no token reached a site.
    """
    sites = [(site, router) for site, router in routed if isinstance(router, TieredRouter)]
    before = [router.threshold.clone() for _, router in sites]
    for _, router in sites:
        router.quantiles.fill_(math.nan)  # no floor
        router.threshold.fill_(-math.inf)
    for turn in _turns(sites):
        moments = [_Moments(site, router) for site, router in turn]
        watch(routed, batches, moments, mode="hard")
        for (site, router), seen in zip(turn, moments, strict=True):
            weights, columns = read_weights(routed.model, site), read_rows(routed.model, site, site.down_rows)
            assert weights is not None, "they were rounded"
            assert columns is not None
            encode(routed.model, site, router, codes_along_inputs(weights, seen.x))
            encode_planes(routed.model, site, router, codes_by_input(columns[None], seen.h))
            router.threshold.fill_(math.inf)
    for (_, router), threshold in zip(sites, before, strict=True):
        router.threshold.copy_(threshold)


def _turns(sites: Turn) -> Iterator[Turn]:
    """TURNS of them, or more where BUDGET_BYTES does not hold as many sites together; one at least."""
    most = math.ceil(len(sites) / TURNS)
    while sites:
        room, n = BUDGET_BYTES, 0
        while n < min(most, len(sites)) and (n == 0 or room >= _bytes(sites[n][0])):
            room -= _bytes(sites[n][0])
            n += 1
        yield sites[:n]
        sites = sites[n:]


def _bytes(site: FFNSite) -> int:
    return 4 * (site.d_model**2 + site.d_ff**2)
