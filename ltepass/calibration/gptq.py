"""Codes that know their inputs: what rounding one input's weights loses, those that come after it make up for.

GPTQ (Frantar et al., arXiv 2210.17323), plainly: inputs in their order, the inverse of their second moment H in one
Cholesky factor, 1 % of its mean diagonal added. With w_i the weights of input i (one an output), U^T U = H^-1:

    for each i:  e = (w_i - rounded(w_i)) / U_ii;  w_j -= U_ij e  for all j >= i

Updates reach the inputs of the present panel at once, and the others when it ends. The format is the proxies'
(`kernels/proxy_codes.py`): blocks of 32 along d_model share a multiplier, which is chosen when the first of them is
reached; a row's scale is that of the weights as they were.

`quantise_planes` does a model's sites in their order, where the sites below are in their codes already. The second
moments of x and of the hidden units are added up in a pass: d_model^2 + d_ff^2 numbers a site. A turn is of as many
sites as BUDGET_BYTES holds and TURNS asks for, with a pass of its own in hard mode: sites that are done give their high
plane alone, which later ones can make up for, the others both planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ltepass.kernels.planes import dequantise
from ltepass.kernels.proxy_codes import (
    LARGEST,
    Codes,
    blocks_of,
    fit_codes,
    in_blocks,
    largest_multiplier,
    pack,
    quantise,
    steps_of,
)
from ltepass.kernels.weight_formats import BLOCK
from ltepass.routed.batches import Batch
from ltepass.routed.observers import Observer, watch
from ltepass.routed.proxy_router import encode, read_weights
from ltepass.routed.routed import Routed
from ltepass.routed.samples import turns
from ltepass.routed.sites import FFNSite, read_rows
from ltepass.routed.tiered_router import TieredRouter, encode_planes
from ltepass.threads import one_thread

DAMPING = 0.01  # of the mean diagonal of H
PANEL = 4 * BLOCK

TURNS = 6

Turn = Sequence[tuple[FFNSite, TieredRouter]]
Rounding = Callable[[int, Tensor], Tensor]  # (i, the weights as they are now [n, m]) -> row i as it will stand


def codes_along_inputs(weights: Tensor, moment: Tensor) -> Codes:
    """GPTQ's codes of linears whose inputs are what the blocks lie along (gate, up). weights: [k, f, d]; moment: [d,
    d].
    """
    shape = weights.shape[:2]
    rows = weights.float().flatten(0, 1)
    rounding = _AlongBlocks(rows)
    feed_back(rows.T, moment, rounding)
    codes = pack(rounding.codes).unflatten(0, shape)
    multipliers = rounding.multipliers.to(torch.uint8).unflatten(0, shape)
    return Codes(codes, multipliers, rounding.step.unflatten(0, shape))


def codes_by_input(weights: Tensor, moment: Tensor) -> Codes:
    """GPTQ's codes of a linear whose blocks lie in one input's weights (down). weights: [1, f, d]; moment: [f, f]."""
    rounding = _WholeRows()
    feed_back(weights[0].float(), moment, rounding)
    return Codes(*(torch.cat(parts, 1) for parts in zip(*rounding.rows, strict=True)))


@torch.no_grad()
def feed_back(weights: Tensor, moment: Tensor, rounding: Rounding) -> Tensor:
    """weights: [n, m], a row an input; moment: [n, n], the inputs' second moment up to a factor -> the rounded rows."""
    left = weights.clone(memory_format=torch.contiguous_format)
    with one_thread():  # the same codes on every machine, and rows are short: more threads take five times as long
        factor = _inverse_factor(moment).to(left)
        for start in range(0, len(left), PANEL):
            end = min(start + PANEL, len(left))
            errors = torch.empty_like(left[start:end])
            for i in range(start, end):
                rounded = rounding(i, left)
                errors[i - start] = (left[i] - rounded) / factor[i, i]
                left[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
                left[i] = rounded
            left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return left


def _inverse_factor(moment: Tensor) -> Tensor:
    """U, upper, of H^-1 = U^T U; fp64."""
    damped = moment.to(torch.float64, copy=True)
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


class _AlongBlocks:
    """Rounds input i of all rows of [n, d]; at each block's first, the multipliers of what the block has become."""

    def __init__(self, rows: Tensor) -> None:
        n, d = rows.shape
        self.most = largest_multiplier(d)
        self.step = steps_of(in_blocks(rows), self.most)
        self.codes = rows.new_zeros(n, BLOCK * blocks_of(d))
        self.multipliers = rows.new_ones(n, blocks_of(d))

    def __call__(self, i: int, left: Tensor) -> Tensor:
        if i % BLOCK == 0:
            _, multipliers, self.units = fit_codes(left[i : i + BLOCK].T, self.step, self.most)
            self.multipliers[:, i // BLOCK] = multipliers
        code = (left[i] / self.units).round().clamp(-LARGEST, LARGEST)
        self.codes[:, i] = code
        return code * self.units


class _WholeRows:
    """Rounds row i of [f, d] to its nearest codes."""

    def __init__(self) -> None:
        self.rows: list[Codes] = []

    def __call__(self, i: int, left: Tensor) -> Tensor:
        codes = quantise(left[None, i : i + 1], blocks=True)
        self.rows.append(codes)
        return dequantise(codes, left.shape[1])[0, 0]


def quantise_planes(routed: Routed, batches: Sequence[Batch]) -> None:
    """New planes of all sites, which have rounded ones; tables go, and thresholds stay.

    Raises CalibrationError where no token reached a site.
    """
    sites = [(site, router) for site, router in routed if isinstance(router, TieredRouter)]
    before = [router.threshold.clone() for _, router in sites]
    active = 1.0 - routed.config["target_sparsity"]
    for _, router in sites:
        router.quantiles.fill_(math.nan)  # no floor
        router.threshold.fill_(-math.inf)
    for turn in _turns(sites):
        moments = [_Moments(site, router, active) for site, router in turn]
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


class _Moments(Observer):
    """X^T X of one site, and H^T H of the hidden units that stand in low bits alone.

    active: share of neurons that read the low plane too, those that write most. What rounding loses of their columns is
    given back, so the others must not make up for it.
    """

    def __init__(self, site: FFNSite, router: TieredRouter, active: float) -> None:
        super().__init__(site, router)
        self.sizes, device = router.sizes, router.threshold.device
        self.active = round(active * site.d_ff)
        self.x, self.h = (torch.zeros(n, n, dtype=torch.float32, device=device) for n in (site.d_model, site.d_ff))

    def on_input(self, x: Tensor) -> None:
        with one_thread():
            self.x.addmm_(x.float().T, x.float())

    def on_hidden(self, h: Tensor) -> None:
        h = h.float()
        if self.active:
            written = h.abs() * self.sizes
            h = h.where(written < written.topk(self.active).values[:, -1:], 0.0)
        with one_thread():
            self.h.addmm_(h.T, h)


def _turns(sites: Turn) -> Iterator[Turn]:
    """TURNS of them, or more where a turn's sums would take too much."""
    return turns(sites, math.ceil(len(sites) / TURNS), lambda one: 4 * (one[0].d_model ** 2 + one[0].d_ff ** 2))
