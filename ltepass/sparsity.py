"""Modes, the inference-time sparsity knob, and how sparse a model really is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.config import Mode, check_mode, check_sparsity
from ltepass.errors import CalibrationError, LoweredError
from ltepass.kernels import tuning
from ltepass.router import N_QUANTILES, Router, logit
from ltepass.sites import require_state, router_of, routers_of
from ltepass.undo import keep, verb

BELOW = 2.0  # the least calibration logit, for a bias that leaves every expert active
SHARED_POINTS = 4096  # values that stand for one site's logits where sites share a threshold


@verb
def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switch every router: "soft" and "hard" as the paper has them, "dense" leaves the gates open.

    Raises ConfigError, NotTransformedError, LoweredError.
    """
    check_mode(mode)
    state = require_state(model, "set_mode")
    if state.lowered is not None:
        raise LoweredError(
            f"the model is lowered (scope {state.lowered!r}), which is hard mode; set_mode expects it as trained; call "
            "ltepass.unlower(model)"
        )
    for router in routers_of(model):
        router.mode = mode
        router.aux = None
    remember_densities(model)


@verb
def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Move every router's threshold to the value that left this share of its calibration experts inactive.

    With the budget "model" all get the one value that leaves this share of all sites' experts inactive. Changes tensors
    in place: works on a lowered model and causes no recompile.
    Raises ConfigError outside [0, 1), CalibrationError without a calibrated table, NotTransformedError.
    """
    check_sparsity(sparsity, "sparsity")
    state = require_state(model, "set_sparsity")
    if not is_calibrated(model):
        raise CalibrationError(
            "the model has no calibrated sparsity table; set_sparsity expects one; call "
            "ltepass.calibrate(model, batches)"
        )
    for site, cut in zip(state.sites, cuts_at(model, sparsity), strict=True):
        router_of(model, site).threshold.copy_(cut)
    remember_densities(model)


def is_calibrated(model: nn.Module) -> bool:
    """Whether every site's router has its table. Raises NotTransformedError."""
    sites = require_state(model, "is_calibrated").sites
    return not any(bool(router_of(model, s).quantiles.isnan().any()) for s in sites)


def cuts_at(model: nn.Module, sparsity: float) -> list[Tensor]:
    """By site: the logit that `sparsity` puts the threshold at, from the tables and the config's budget."""
    state = require_state(model, "cuts_at")
    tables = [router_of(model, s).quantiles for s in state.sites]
    if state.config["budget"] == "model":
        cut = shared_cut(tables, sparsity)
        return [cut.to(table.device) for table in tables]
    return [interpolate(table, sparsity) for table in tables]


def remember_densities(model: nn.Module) -> None:
    """Tell the GPU kernels how many experts to expect, so that no call has to count: their path depends on it."""
    for router in routers_of(model):
        density = expected_density(router)
        if density is not None:
            tuning.remember_density(router.threshold, density)


def expected_density(router: Router) -> float | None:
    """Share of (token, expert) pairs active at the present threshold, as the calibrated table has it; None without."""
    if router.threshold.is_meta or bool(router.quantiles.isnan().any()):
        return None
    return float((router.quantiles > router.threshold).float().mean())


def interpolate(quantiles: Tensor, sparsity: float) -> Tensor:
    """The table's value at a sparsity, linear between its points; 0 lets every expert pass."""
    if sparsity == 0.0:
        return quantiles.new_tensor(-torch.inf)
    at = sparsity * (N_QUANTILES - 1)
    low = int(at)
    return torch.lerp(quantiles[low], quantiles[min(low + 1, N_QUANTILES - 1)], at - low)


class SomeRows:
    """Copies of at most `keep` rows of each tensor, drawn at random, the same for the same tensors; None keeps all.

    A stride would meet the length of the sequences and see some positions only.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(0)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.keep is None or len(rows) <= self.keep:
            return rows.clone()
        return rows[torch.randperm(len(rows), generator=self.generator)[: self.keep].to(rows.device)]


@contextmanager
def record_logits(model: nn.Module, keep: int | None = None, *, flat: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect every router's logits [n_tokens, n_experts] by site name while the block runs.

    keep: at most so many tokens per forward; None keeps all. flat: False leaves the shape as it is.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for site in require_state(model, "record_logits").sites:
        rows, draw = seen.setdefault(site.name, []), SomeRows(keep)

        def hook(
            module: nn.Module,
            args: Any,
            logits: Tensor | None,
            rows: list[Tensor] = rows,
            draw: SomeRows = draw,
        ) -> None:
            if logits is not None and not flat:
                rows.append(logits.detach().clone())
            elif logits is not None:
                rows.append(draw(logits.detach().reshape(-1, logits.shape[-1])))

        handles.append(router_of(model, site).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_batches(model: nn.Module, batches: Iterable[Any]) -> None:
    """Forward passes for what hooks see, without gradients, in eval mode; the training flags are as before afterwards.

    Nobody reads the logits, a fifth of a pass on SmolLM2-135M: a language model that can makes the last token's only.
    """
    heads = getattr(model, "get_output_embeddings", lambda: None)() is not None
    fewest = {}
    if heads and "logits_to_keep" in signature(model.forward).parameters:
        fewest["logits_to_keep"] = torch.tensor([-1])  # for an int, Gemma 4 drops tokens before its last FFNs
    flags = {m: m.training for m in model.modules()}
    for module in flags:
        module.training = False  # an exported module has no eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, dict):
                    model(**fewest | {k: v for k, v in batch.items() if k != "labels"})
                else:
                    model(batch, **fewest)
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def mode_of(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Run a block in another mode."""
    before: list[tuple[Router, Mode]] = [(r, r.mode) for r in routers_of(model)]
    for router, _ in before:
        router.mode = mode
    try:
        yield
    finally:
        for router, old in before:
            router.mode = old


@verb
def measure_sparsity(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Share of inactive neurons by site name, over all tokens of the batches, each seen through hard gates.

    batches: dicts of model inputs, or token id tensors. Raises NotTransformedError, LoweredError.
    """
    state = require_state(model, "measure_sparsity")
    if state.lowered is not None:
        raise LoweredError("measure_sparsity expects the model as trained; call ltepass.unlower(model)")
    with mode_of(model, "hard"), record_logits(model) as seen:
        run_batches(model, batches)
    thresholds = {s.name: router_of(model, s).threshold for s in state.sites}
    return {
        name: 1.0 - float(torch.cat([(r > thresholds[name]).float().mean(1) for r in rows]).mean())
        for name, rows in seen.items()
    }


@verb
def measure_union(model: nn.Module, batches: Iterable[Any], window: int = 2) -> dict[str, float]:
    """Share of experts by site name that no token of `window` neighbouring ones uses: what a batched kernel can skip.

    Every whole window of every row counts. Raises NotTransformedError.
    """
    with mode_of(model, "hard"), record_logits(model, flat=False) as seen:
        run_batches(model, batches)
    thresholds = {s.name: router_of(model, s).threshold for s in require_state(model, "measure_union").sites}
    out = {}
    for name, rows in seen.items():
        unused = [(r <= thresholds[name]).unfold(-2, window, 1).all(-1).float().flatten(0, -2) for r in rows]
        out[name] = float(torch.cat(unused).mean())
    return out


def update_table(model: nn.Module, batches: Iterable[Any]) -> None:
    """Fill every router's quantile table from its logits on these batches, seen through the model's present gates.

    A router that no token reached keeps its table.
    """
    state = require_state(model, "update_table")
    present = router_of(model, state.sites[0]).mode
    with mode_of(model, "hard" if present == "dense" else present), record_logits(model, keep=512) as seen:
        run_batches(model, batches)
    for site in state.sites:
        if seen[site.name]:
            router_of(model, site).quantiles.copy_(table_of(torch.cat(seen[site.name]).float()))


def table_of(logits: Tensor) -> Tensor:
    """[101]: the thresholds that leave 0 %, 1 %, ... 100 % of these logits, of any shape, at or below them."""
    return quantiles(logits.flatten(), torch.linspace(0.0, 1.0, N_QUANTILES, device=logits.device))


def place_threshold(router: Router, table: Tensor, cut: Tensor) -> None:
    """Take over a new table of logits; the bias moves, so that a threshold at `cut` is logit(tau), as in the paper."""
    with torch.no_grad():
        if router.bias is None:
            router.quantiles.copy_(table)
            router.threshold.copy_(cut)
            return
        keep(router.bias)
        shift = logit(router.tau) - cut
        router.bias.add_(shift)
        router.quantiles.copy_(table + shift)
        router.threshold.fill_(logit(router.tau))


def move_biases(model: nn.Module, sparsity: float) -> None:
    """As `set_sparsity`, but where a router has a bias that moves, and the threshold is logit(tau) again afterwards.

    At 0 it stands below the calibration logits: no bias moves by infinity.
    """
    state = require_state(model, "move_biases")
    routers = [router_of(model, site) for site in state.sites]
    cuts = cuts_at(model, sparsity)
    if sparsity == 0.0 and all(router.bias is not None for router in routers):
        least = [router.quantiles[0] for router in routers]
        shared = min(map(float, least)) if state.config["budget"] == "model" else math.inf
        cuts = [one.clamp_max(shared) - BELOW for one in least]
    for router, cut in zip(routers, cuts, strict=True):
        place_threshold(router, router.quantiles, cut)


def shared_cut(tables: Sequence[Tensor], sparsity: float) -> Tensor:
    """The logit below which this share of all sites' experts lies; each site counts alike. tables: [101] each."""
    device = tables[0].device
    if sparsity == 0.0:
        return torch.tensor(-torch.inf, device=device)
    grid = torch.linspace(0.0, 1.0, SHARED_POINTS, device=device)
    pooled = torch.cat([quantiles(table.to(device), grid) for table in tables])
    return quantiles(pooled, torch.tensor(sparsity, device=device))


def quantiles(values: Tensor, grid: Tensor) -> Tensor:
    """Quantiles of a long vector: torch.quantile stops at 2^24 values."""
    ordered = values.sort().values
    at = grid * (len(ordered) - 1)
    low = at.floor().long()
    return torch.lerp(ordered[low], ordered[(low + 1).clamp_max(len(ordered) - 1)], at - low)
