"""Cuts on what the active experts read: TEAL's rule (arXiv 2408.14690) inside LTE.

    x' = x * [|x| > input cut];  h = act(gate x') * (up x') of the active experts;  y = down (h * [|h| > cut])

A router chooses whole experts. Which entries of x are small is known before anything of the FFN is read, and which
hidden units are small before a third of it is: each is known exactly, entry by entry. Routers see all of x. Not in the
paper; off unless asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ltepass.config import check_sparsity
from ltepass.routed.batches import Batch
from ltepass.routed.observers import Observer, require_finite, watch
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import Reservoir
from ltepass.routed.sites import FFNSite
from ltepass.routed.undo import verb

# Entries of a site that a cut is placed by, in whole rows drawn at random from all tokens: features differ in size,
# and a stride meets their number (with d_model 576 and 2,048 tokens it saw 4 of them).
SAMPLE = 2**19
LEAST_ROWS = 256  # of them, however wide: tokens differ too
Setting = Literal["hidden_sparsity", "input_sparsity"]
BUFFERS: dict[Setting, str] = {"hidden_sparsity": "cut", "input_sparsity": "input_cut"}  # of the router


@verb
def set_hidden_sparsity(model: nn.Module, share: float, batches: Iterable[Batch]) -> None:
    """Leave the smallest `share` of active experts' hidden units out of the down projection, in hard mode.

    Training in hard mode goes on under the cuts, `LTETrainer` places them again at the end of a stage, and they are
    saved with the model. Call it again after `set_sparsity`: other experts give other hidden units.

    Arguments:
        model: a transformed model, not lowered.
        share: in [0, 1), of the hidden units that active experts give on `batches`, site by site; 0 ends it. An FFN of
            three matrices then reads (1 - share / 3) of its active experts' bytes.
        batches: dicts of model inputs or token ids; not those of a test.
    Returns: None.
    Raises: ConfigError, NotTransformedError, LoweredError, CalibrationError (no tokens seen).
    Example:
        >>> ltepass.set_hidden_sparsity(model, 0.3, batches)
        >>> ltepass.report(model).config["hidden_sparsity"]
        0.3
    """
    _set(Routed.trained(model, "set_hidden_sparsity"), "hidden_sparsity", share, batches)


@verb
def set_input_sparsity(model: nn.Module, share: float, batches: Iterable[Batch]) -> None:
    """Leave the smallest `share` of each FFN's inputs out of its up and gate projections, in hard mode.

    For one token on a CPU an FFN of three matrices then reads (1 - 2 share / 3) of its active experts' bytes: lowering
    stores up and gate with a row for each input there. Several tokens get the same numbers and save nothing by it; on a
    GPU such an FFN stays masked-dense (`ltepass.report` says so).

    Arguments:
        model: a transformed model, not lowered.
        share: in [0, 1), of the entries of x on `batches`; 0 ends it. Combines with `set_hidden_sparsity`.
        batches: dicts of model inputs or token ids; not those of a test.
    Returns: None.
    Raises: ConfigError, NotTransformedError, LoweredError, CalibrationError (no tokens seen).
    Example:
        >>> ltepass.set_input_sparsity(model, 0.2, batches)
        >>> ltepass.report(model).config["input_sparsity"]
        0.2
    """
    _set(Routed.trained(model, "set_input_sparsity"), "input_sparsity", share, batches)


def _set(routed: Routed, setting: Setting, share: float, batches: Iterable[Batch]) -> None:
    """Every router has a cut, or none where the share is 0, and cuts are placed."""
    check_sparsity(share, setting)
    routed.require_gates(f"set_{setting}")
    routed.config[setting] = share
    routers = [router for site, _ in routed for router in routed.copies(site)]
    if share and len(routers) > len(routed.sites) and any(getattr(r, BUFFERS[setting]) is None for r in routers):
        warnings.warn(
            f"{setting} was 0 when PEFT copied the routers, and an adapter's folder loads only what the base model's "
            f"routers have; save the base model as well, or call set_{setting} before get_peft_model",
            stacklevel=2,
        )
    for router in routers:  # also those that another adapter keeps
        setattr(router, BUFFERS[setting], torch.full_like(router.threshold, -1.0) if share else None)
    if share:
        place_cuts(routed, batches)


def place_cuts(routed: Routed, batches: Iterable[Batch]) -> None:
    """Cuts at the configured shares' quantiles of what FFNs see and active experts give on `batches`.

    Two passes, the second with the cuts of the first: what an FFN leaves out changes what the next ones see. Does
    nothing for a model without cuts. Raises CalibrationError where no token reached a site.
    """
    shares = {setting: routed.config[setting] for setting in BUFFERS if routed.config[setting]}
    if not shares:
        return
    batches = list(batches)
    for router in routed.routers:
        for setting in shares:
            getattr(router, BUFFERS[setting]).fill_(-1.0)
    for _ in range(2):
        sizes = [_Sizes(site, router, tuple(shares)) for site, router in routed]
        watch(routed, batches, sizes, mode="hard")
        for one in sizes:
            for setting, share in shares.items():
                getattr(one.router, BUFFERS[setting]).copy_(one.quantile(setting, share))


class _Sizes(Observer):
    """x of a site and h of its active experts, before its own cuts: samples of their rows."""

    def __init__(self, site: FFNSite, router: Router, settings: Sequence[Setting]) -> None:
        super().__init__(site, router)
        widths = {"input_sparsity": site.d_model, "hidden_sparsity": site.group_size}
        self.kept = {setting: Reservoir(max(LEAST_ROWS, SAMPLE // widths[setting])) for setting in settings}

    def on_input(self, x: Tensor) -> None:
        self.active = self.router.logits(x.float()) > self.router.threshold
        if "input_sparsity" in self.kept:
            self.kept["input_sparsity"].add(x)

    def on_hidden(self, h: Tensor) -> None:
        if "hidden_sparsity" in self.kept:
            self.kept["hidden_sparsity"].add(h.unflatten(-1, (self.router.n_experts, -1))[self.active])

    def quantile(self, setting: Setting, share: float) -> Tensor:
        """[] fp32: up to it are `share` of the sample; negative where no expert was active."""
        sizes = self.kept[setting].rows().flatten().abs().float()
        require_finite(self.site.name, sizes)
        at = int(share * len(sizes))
        if at == 0:
            return sizes.new_tensor(-1.0)
        between = sizes.sort().values[at - 1 : at + 1]  # no size seen is the cut itself: rounding would decide
        return between.mean()
