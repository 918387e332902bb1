"""Modes, the inference-time sparsity knob, and how sparse a model really is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.config import Mode, check_mode, check_sparsity
from ltepass.errors import CalibrationError
from ltepass.routed import padding
from ltepass.routed.batches import fewest_logits, inputs_of, is_empty
from ltepass.routed.router import N_QUANTILES, Router, logit
from ltepass.routed.sites import FFNSite, require_state, require_trained, router_of, routers_of
from ltepass.routed.undo import keep, verb
from ltepass.threads import unshared

BELOW = 2.0  # the least calibration logit, for a bias that leaves every expert active
TABLE_TOKENS = 8192  # of which a site's table is made: a share is then off by half a point over sqrt(n_experts)
SHARED_POINTS = 4096  # values that stand for one site's logits where sites share a threshold


@verb
def set_mode(model: nn.Module, mode: Mode) -> None:
    """Switch every router: "soft" and "hard" as the paper has them, "dense" leaves the gates open.

    Raises ConfigError, NotTransformedError, LoweredError.
    """
    check_mode(mode)
    require_trained(model, "set_mode")
    for router in routers_of(model):
        router.mode = mode
        router.kept.clear()
    if mode == "soft":
        padding.attach(model)  # what a forward leaves for the losses begins anew with the next
    else:
        padding.detach(model)
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
        router.note_density()


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


class Reservoir:
    """At most `keep` of all rows that were added, each as likely as any other, in their order.

    The same rows give the same sample, however they were divided into batches.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.generator = keep, torch.Generator().manual_seed(0)
        self.parts: list[Tensor] = []
        self.keys = torch.empty(0, dtype=torch.float64)  # of the kept rows: those with the smallest are kept

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        if len(self.keys) == self.keep:
            hopeful = keys < self.keys.max()
            rows, keys = rows[hopeful.to(rows.device)], keys[hopeful]
        self.parts, self.keys = [*self.parts, rows.clone()], torch.cat([self.keys, keys])
        if len(self.keys) > self.keep:
            best = self.keys.topk(self.keep, largest=False, sorted=False).indices.sort().values
            self.parts, self.keys = [self.rows()[best.to(rows.device)]], self.keys[best]

    def rows(self) -> Tensor:
        """At least one tensor must have been added."""
        return torch.cat(self.parts)

    def __len__(self) -> int:
        return len(self.keys)


@contextmanager
def on_logits(model: nn.Module, see: Callable[[FFNSite, Router, Tensor], None]) -> Iterator[None]:
    """Calls see(site, router, logits [..., n_experts]) after every router while the block runs, without gradients."""

    def hook(site: FFNSite) -> Callable[[Any, Any, Tensor | None], None]:
        def run(router: Router, args: Any, logits: Tensor | None) -> None:
            if logits is not None:
                see(site, router, logits.detach())

        return run

    sites = require_trained(model, "a look at its logits").sites
    handles = [router_of(model, site).register_forward_hook(hook(site)) for site in sites]
    try:
        with padding.telling_tokens(model), unshared(routers_of(model)):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_logits(model: nn.Module, keep: int | None = None, *, flat: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect every router's logits [n_tokens, n_experts] by site name while the block runs, without those of padding.

    keep: at most so many tokens per forward; None keeps all. flat: False leaves the shape as it is, padding included.
    """
    seen: dict[str, list[Tensor]] = {site.name: [] for site in require_trained(model, "record_logits").sites}
    draws = {name: SomeRows(keep) for name in seen}

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        rows = draws[site.name](padding.tokens_of(router, logits)) if flat else logits.clone()
        seen[site.name].append(rows)

    with on_logits(model, see):
        yield seen


def run_batches(model: nn.Module, batches: Iterable[Any]) -> None:
    """Forward passes for what hooks see, without gradients, in eval mode; the training flags are as before afterwards.

    Nobody reads the logits of a language model, and as few as it can are made. Batches without a token are passed by.
    Raises CalibrationError for a batch that is no model input.
    """
    flags = {m: m.training for m in model.modules()}
    for module in flags:
        module.training = False  # an exported module has no eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if is_empty(batch):
                    continue
                args, named = inputs_of(model, batch)
                model(*args, **fewest_logits(model, named) | named)
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def mode_of(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Run a block in another mode. Forwards of other threads raise ConcurrencyError meanwhile."""
    before: list[tuple[Router, Mode]] = [(r, r.mode) for r in routers_of(model)]
    with unshared(router for router, _ in before):
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

    batches: mappings of model inputs, or token id tensors; padding is not counted. Raises NotTransformedError,
    LoweredError, CalibrationError (no tokens seen).
    """
    active = {site.name: Tally() for site in require_trained(model, "measure_sparsity").sites}

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        active[site.name].add(padding.tokens_of(router, logits) > router.threshold)

    with mode_of(model, "hard"), on_logits(model, see):
        run_batches(model, batches)
    require_seen({name: tally.count for name, tally in active.items()})
    return {name: 1.0 - tally.share() for name, tally in active.items()}


@verb
def measure_union(model: nn.Module, batches: Iterable[Any], window: int = 2) -> dict[str, float]:
    """Share of experts by site name that no token of `window` neighbouring ones uses: what a batched kernel can skip.

    Every whole window of every row counts that holds no padding. Raises NotTransformedError, LoweredError,
    CalibrationError (no window of tokens seen).
    """
    unused = {site.name: Tally() for site in require_trained(model, "measure_union").sites}

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        logits, real = padding.sequences_of(router, logits)
        if logits.shape[-2] >= window:
            nobody = (logits <= router.threshold).unfold(-2, window, 1).all(-1)
            unused[site.name].add(nobody[real.unfold(-1, window, 1).all(-1)])

    with mode_of(model, "hard"), on_logits(model, see):
        run_batches(model, batches)
    require_seen({name: tally.count for name, tally in unused.items()})
    return {name: tally.share() for name, tally in unused.items()}


class Tally:
    """How many of the entries that were added are True: counts, so that a million tokens take no more than one."""

    def __init__(self) -> None:
        self.count, self.true = 0, 0

    def add(self, entries: Tensor) -> None:
        self.count += entries.numel()
        self.true = self.true + entries.sum()  # type: ignore[assignment]  # a tensor: no GPU is waited for

    def share(self) -> float:
        return int(self.true) / self.count


def require_seen(counts: dict[str, int]) -> None:
    """counts: by site name, of tokens or batches that it saw. Raises CalibrationError where that is none."""
    missed = [name for name, count in counts.items() if not count]
    if missed:
        raise CalibrationError(
            f"no token reached {missed[0]} ({len(missed)} of {len(counts)} sites); expected at least one "
            "batch that runs through every FFN; pass batches of token ids"
        )


def update_table(model: nn.Module, batches: Iterable[Any]) -> None:
    """Fill every router's quantile table from its logits on these batches, seen through the model's present gates.

    A router that no token reached keeps its table; one that many reached gets it from TABLE_TOKENS of them.
    """
    state = require_trained(model, "update_table")
    samples = {site.name: Reservoir(TABLE_TOKENS) for site in state.sites}
    present = router_of(model, state.sites[0]).mode

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        samples[site.name].add(padding.tokens_of(router, logits))

    with mode_of(model, "hard" if present == "dense" else present), on_logits(model, see):
        run_batches(model, batches)
    for site in state.sites:
        if len(samples[site.name]):
            router_of(model, site).quantiles.copy_(table_of(samples[site.name].rows()))


def table_of(logits: Tensor) -> Tensor:
    """[101]: the thresholds that leave 0 %, 1 %, ... 100 % of these logits, of any shape, at or below them."""
    return quantiles(logits.flatten(), torch.linspace(0.0, 1.0, N_QUANTILES, dtype=torch.float32, device=logits.device))


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
        return tables[0].new_tensor(-torch.inf)
    grid = torch.linspace(0.0, 1.0, SHARED_POINTS, dtype=torch.float32, device=device)
    pooled = torch.cat([quantiles(table.to(device), grid) for table in tables])
    return quantiles(pooled, tables[0].new_tensor(sparsity))


def quantiles(values: Tensor, grid: Tensor) -> Tensor:
    """Quantiles of a long vector: torch.quantile stops at 2^24 values."""
    ordered = values.sort().values
    at = grid.double() * (len(ordered) - 1)  # fp32 cannot count that far either
    low = at.floor().long()
    return torch.lerp(ordered[low], ordered[(low + 1).clamp_max(len(ordered) - 1)], (at - low).to(ordered))
