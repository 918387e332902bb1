"""Layer-wise warm start: before any gradient step, each FFN is refitted to what the dense model computed.

One forward runs two copies of the text side by side. The first copy stays dense; the second goes through hard gates. At
each FFN in turn, with the inputs that the layers below already made sparse:

    threshold   is placed so that the target share of experts is inactive on these inputs
    down        is refitted in closed form so that the gated output meets the dense copy's output

    min over D of  |H (W + D) - Y|^2 + sum_j penalty_j |D_j|^2,   H gated hidden units, Y dense outputs

Nothing is learned from labels, so this costs two forwards and one solve of size d_ff for each site.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError, LoweredError
from ltepass.router import N_QUANTILES, Router, logit
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import interpolate, mode_of, quantiles, run_batches

PENALTY = 0.3  # of each neuron's own energy: shrinks the refit of neurons that were rarely seen


class _DoneError(Exception):
    """Every site was seen: the rest of the forward is not needed."""


def warm_start(
    model: nn.Module,
    input_ids: Tensor,
    *,
    penalty: float = PENALTY,
    on_site: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Refit thresholds and down projections in place; returns each site's remaining relative error |HW - Y|^2 / |Y|^2.

    input_ids: [n, T] int64, all run in one forward; 8,192 tokens are enough for d_ff = 1,536. The model must be
    calibrated (routers started). Leaves mode, training flags and hooks as they were; weights change but for routers'.
    Raises NotTransformedError, LoweredError, CalibrationError.
    """
    state = require_state(model, "warm_start")
    if state.lowered is not None:
        raise LoweredError("warm_start expects the model as transformed; call ltepass.unlower(model)")
    if any(bool(router_of(model, s).quantiles.isnan().any()) for s in state.sites):
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
    for site in state.sites:
        fit = _SiteFit(model, site, target, penalty, len(input_ids), fitted)
        handles.append(router_of(model, site).register_forward_hook(fit.on_logits))
        handles.append(model.get_submodule(site.down).register_forward_hook(fit.on_down))
    try:
        with mode_of(model, "hard"):
            run_batches(model, [{"input_ids": torch.cat([input_ids, input_ids]), "use_cache": False}])
    except _DoneError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return errors


class _SiteFit:
    """The two hooks of one site; rows [:half] of every tensor are the dense copy, the others the sparse one."""

    def __init__(
        self,
        model: nn.Module,
        site: FFNSite,
        target: float,
        penalty: float,
        half: int,
        fitted: Callable[[FFNSite, float], None],
    ) -> None:
        self.model, self.site, self.target, self.penalty, self.half = model, site, target, penalty, half
        self.fitted = fitted

    def on_logits(self, router: Router, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        sparse = logits[self.half :]
        table = quantiles(sparse.flatten(), torch.linspace(0.0, 1.0, N_QUANTILES, device=logits.device))
        place_threshold(router, table, self.target)
        if router.bias is not None:
            shift = router.quantiles[0] - table[0]
            sparse = sparse + shift
        return torch.cat([torch.full_like(logits[: self.half], torch.inf), sparse])

    def on_down(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        h = args[0][self.half :].flatten(0, -2).float()
        missing = (out[: self.half] - out[self.half :]).flatten(0, -2).float()
        gram = h.T @ h
        energy = gram.diagonal().clone()
        gram.diagonal().add_(self.penalty * energy + 1e-3 * energy.mean() + 1e-12)
        change = torch.linalg.solve(gram, h.T @ missing)
        weight = self.site.down_rows.of(self.model, self.site.d_ff)
        weight.add_(change.to(weight.dtype))
        fixed = out[self.half :] + (h @ change).view_as(out[self.half :]).to(out.dtype)
        dense = out[: self.half]
        error = float((fixed - dense).float().square().sum() / dense.float().square().sum())
        self.fitted(self.site, error)
        return torch.cat([dense, fixed])


def place_threshold(router: Router, table: Tensor, sparsity: float) -> None:
    """Take over a new table of logits; the bias moves so that the threshold stays logit(tau), as in the paper."""
    with torch.no_grad():
        if router.bias is None:
            router.quantiles.copy_(table)
            router.threshold.copy_(interpolate(table, sparsity))
            return
        shift = logit(router.tau) - interpolate(table, sparsity)
        router.bias.add_(shift)
        router.quantiles.copy_(table + shift)
        router.threshold.fill_(logit(router.tau))
