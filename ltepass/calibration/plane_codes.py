"""High codes of a site's linears, of a quantiser that knows what they see in the dense model.

A dense pass adds up the second moments of x and of the hidden units. They take d_model^2 + d_ff^2 numbers a site, so
that sites are done in turns of what BUDGET_BYTES holds, each with a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ltepass.calibration.gptq import codes_along_inputs, codes_by_input
from ltepass.kernels.proxy_reference import Codes
from ltepass.routed.batches import Batch
from ltepass.routed.proxy_router import read_rows, read_weights
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import BUDGET_BYTES
from ltepass.routed.sites import FFNSite
from ltepass.routed.watching import Observer, watch

HighCodes = tuple[Codes, Codes]  # of gate and up; of down's columns


class _Moments(Observer):
    """X^T X and H^T H of one site."""

    def __init__(self, site: FFNSite, router: Router, device: torch.device) -> None:
        super().__init__(site, router)
        self.x, self.h = (torch.zeros(n, n, dtype=torch.float32, device=device) for n in (site.d_model, site.d_ff))

    def on_input(self, x: Tensor) -> None:
        self.x.addmm_(x.float().T, x.float())

    def on_hidden(self, h: Tensor) -> None:
        self.h.addmm_(h.float().T, h.float())


def high_codes(routed: Routed, batches: Sequence[Batch]) -> Iterator[tuple[str, HighCodes]]:
    """By site name, as soon as they are made. Sites whose weights are not to be read have none."""
    for some in _turns(list(routed)):
        moments = [_Moments(site, router, router.threshold.device) for site, router in some]
        watch(routed, batches, moments)
        for of in moments:
            weights = read_weights(routed.model, of.site)
            columns = read_rows(routed.model, of.site, of.site.down_rows)
            if weights is not None and columns is not None:
                yield of.site.name, (codes_along_inputs(weights, of.x), codes_by_input(columns[None], of.h))


def _turns(sites: list[tuple[FFNSite, Router]]) -> Iterator[list[tuple[FFNSite, Router]]]:
    """What fits in BUDGET_BYTES together; one at least."""
    while sites:
        room, n = BUDGET_BYTES, 0
        while n < len(sites) and (n == 0 or room >= _bytes(sites[n][0])):
            room -= _bytes(sites[n][0])
            n += 1
        yield sites[:n]
        sites = sites[n:]


def _bytes(site: FFNSite) -> int:
    return 4 * (site.d_model**2 + site.d_ff**2)
