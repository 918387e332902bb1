"""A cut on the hidden units of active experts: TEAL's rule (arXiv 2408.14690) inside LTE, for the down projection.

    h = act(gate x) * (up x) of the active experts;  y = down (h * [|h| > cut])

A router knows only x, so it chooses whole experts. What it chose in vain can be seen once h is there, unit by unit and
exactly, before a third of the weights is read. Not in the paper; off unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.config import check_sparsity
from ltepass.errors import CalibrationError, LoweredError
from ltepass.kernels.reference import mask
from ltepass.observing import Observer
from ltepass.router import Router
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import mode_of, run_batches

SAMPLE = 8192  # hidden units kept of a forward and site: a cut is one number


def set_hidden_sparsity(model: nn.Module, share: float, batches: Iterable[Any]) -> None:
    """Leave the smallest `share` of active experts' hidden units out of the down projection, in hard mode; 0 ends it.

    share: in [0, 1), of the hidden units that active experts give on `batches` (dicts of model inputs or token ids; not
        those of a test), site by site. An FFN of three matrices then reads (1 - share / 3) of its active experts'
        bytes. Training in hard mode goes on under the cuts, `LTETrainer` places them again at the end of a stage, and
        they are saved with the model. Call it again after `set_sparsity`: other experts give other hidden units.
    Raises ConfigError, NotTransformedError, LoweredError, CalibrationError (no tokens seen).
    """
    check_sparsity(share, "hidden_sparsity")
    state = require_state(model, "set_hidden_sparsity")
    if state.lowered is not None:
        raise LoweredError("set_hidden_sparsity expects the model as trained; call ltepass.unlower(model)")
    state.config["hidden_sparsity"] = share
    for site in state.sites:
        router = router_of(model, site)
        router.cut = torch.full_like(router.threshold, -1.0) if share else None
    place_cuts(model, batches)


def place_cuts(model: nn.Module, batches: Iterable[Any]) -> None:
    """Cuts at the configured share's quantile of what active experts give on `batches`.

    Two passes, the second with the cuts of the first: what an FFN leaves out changes what the next ones see. Does
    nothing for a model without cuts. Raises CalibrationError where no token reached a site.
    """
    state = require_state(model, "place_cuts")
    share = state.config["hidden_sparsity"]
    if share == 0.0:
        return
    batches = list(batches)
    for site in state.sites:
        _cut_of(router_of(model, site)).fill_(-1.0)
    for _ in range(2):
        sizes = [_Sizes(site, router_of(model, site)) for site in state.sites]
        try:
            for one in sizes:
                one.open()
            with mode_of(model, "hard"):
                run_batches(model, batches)
        finally:
            for one in sizes:
                one.close()
        for one in sizes:
            _cut_of(one.router).copy_(one.quantile(share))


def _cut_of(router: Router) -> Tensor:
    assert router.cut is not None, "hidden_sparsity above 0 comes with cuts"
    return router.cut


class _Sizes(Observer):
    """|h| of a site's active experts before its own cut: a sample."""

    def __init__(self, site: FFNSite, router: Router) -> None:
        super().__init__(site, router)
        self.kept: list[Tensor] = []

    def on_input(self, x: Tensor) -> None:
        self.active = mask(x, self.router.weight, self.router.bias, self.router.threshold)

    def on_hidden(self, h: Tensor) -> None:
        sizes = h.abs().unflatten(-1, (self.router.n_experts, -1))[self.active].flatten()
        self.kept.append(sizes[:: max(1, len(sizes) // SAMPLE)].float())

    def quantile(self, share: float) -> Tensor:
        """[] fp32: up to it are `share` of the sample; negative where no expert was active."""
        if not self.kept:
            raise CalibrationError(
                f"no token reached {self.site.name}; expected at least one batch that runs through every FFN; pass "
                "batches of token ids"
            )
        sizes = torch.cat(self.kept)
        at = int(share * len(sizes))
        if at == 0:
            return sizes.new_tensor(-1.0)
        between = sizes.sort().values[at - 1 : at + 1]  # no size seen is the cut itself: rounding would decide
        return between.mean()
