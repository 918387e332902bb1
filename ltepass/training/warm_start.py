"""Layer-wise warm start: before any gradient step, each FFN's down projection makes up for the experts left out.

One forward runs through hard gates. At each FFN in turn, with the inputs that the layers below already made sparse:

    threshold   is placed so that the target share of experts is inactive on these inputs (not with budget "model")
    down        is refitted in closed form so that the gated output meets what the whole FFN gives for the same input

    min over D of  |G (W + D) - H W|^2 + sum_j penalty_j |D_j|^2,   H hidden units, G gated

Nothing is learned from labels: one forward, and one solve of size d_ff a site. To aim at what the dense model computes
from its own inputs instead looks better and is not: on SmolLM2-135M at 50 % (groups of 8, 8,192 tokens) it took the
perplexities of three texts from 38 / 58 / 123 to 63 / 62 / 133, this target to 27 / 44 / 59.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError, LoweredError
from ltepass.router import Router
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import interpolate, is_calibrated, mode_of, place_threshold, run_batches, table_of
from ltepass.undo import keep, verb

PENALTY = 0.3  # of each neuron's own energy: shrinks the refit of neurons that were rarely seen


class _DoneError(Exception):
    """Every site was seen: the rest of the forward is not needed."""


@verb
def warm_start(
    model: nn.Module,
    input_ids: Tensor,
    *,
    penalty: float = PENALTY,
    on_site: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Refit thresholds and down projections in place; returns each site's error |G (W + D) - H W|^2 / |H W|^2.

    input_ids: [n, T] int64, all run in one forward; as many as memory allows, and none that is kept for measuring. The
    model must be calibrated (routers started). Leaves mode, training flags and hooks as they were; weights change but
    for routers'.
    Raises NotTransformedError, LoweredError, CalibrationError.
    """
    state = require_state(model, "warm_start")
    if state.lowered is not None:
        raise LoweredError("warm_start expects the model as transformed; call ltepass.unlower(model)")
    if not is_calibrated(model):
        raise CalibrationError("warm_start needs started routers; call ltepass.calibrate(model, batches) first")
    target = float(state.config["target_sparsity"])
    errors: dict[str, float] = {}

    def fitted(site: FFNSite, error: float) -> None:
        errors[site.name] = error
        if on_site is not None:
            on_site(len(errors), error)
        if len(errors) == len(state.sites):
            raise _DoneError

    handles: list[Any] = []
    routers = [router_of(model, site) for site in state.sites]
    for site, router in zip(state.sites, routers, strict=True):
        fit = _SiteFit(model, site, None if state.config["budget"] == "model" else target, penalty, fitted)
        handles.append(router.register_forward_hook(fit.on_logits))
        handles.append(model.get_submodule(site.down).register_forward_hook(fit.on_down))
        router.observer = fit.on_hidden
    try:
        with mode_of(model, "hard"):
            run_batches(model, [{"input_ids": input_ids, "use_cache": False}])
    except _DoneError:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for router in routers:
            router.observer = None
    return errors


class _SiteFit:
    """What happens at one site, in the order of the forward: logits, hidden units, output."""

    def __init__(
        self,
        model: nn.Module,
        site: FFNSite,
        target: float | None,
        penalty: float,
        fitted: Callable[[FFNSite, float], None],
    ) -> None:
        self.model, self.site, self.target, self.penalty, self.fitted = model, site, target, penalty, fitted

    def on_logits(self, router: Router, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        if self.target is None:  # one threshold serves all sites: none moves alone
            return logits
        table = table_of(logits)
        place_threshold(router, table, interpolate(table, self.target))
        return logits + (router.quantiles[0] - table[0])  # the bias may have moved

    def on_hidden(self, h: Tensor) -> None:
        self.h = h.flatten(0, -2).float()

    def on_down(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weight = self.site.down_rows.of(self.model, self.site.d_ff)
        gated, h = args[0].flatten(0, -2).float(), self.h
        del self.h
        missing = (h - gated) @ weight.float()
        gram = gated.T @ gated
        energy = gram.diagonal().clone()
        gram.diagonal().add_(self.penalty * energy + 1e-3 * energy.mean() + 1e-12)
        change = torch.linalg.solve(gram, gated.T @ missing)
        error = float((missing - gated @ change).square().sum() / (h @ weight.float()).square().sum())
        keep(weight)  # a sum cannot be taken back bit by bit
        weight.add_(change.to(weight.dtype))
        fixed: Tensor = out + (gated @ change).view_as(out).to(out.dtype)
        self.fitted(self.site, error)
        return fixed
