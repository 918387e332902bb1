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

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError
from ltepass.progress import tell
from ltepass.routed.batches import mapping_of, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.observers import require_finite, require_seen
from ltepass.routed.quantile_table import interpolate, table_of
from ltepass.routed.routed import Routed, require_whole
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite, NeuronRows
from ltepass.routed.token_masks import telling_tokens, tokens_of
from ltepass.routed.undo import keep, verb
from ltepass.sparsity.thresholds import is_calibrated, place_threshold
from ltepass.threads import one_thread

PENALTY = 0.3  # of each neuron's own energy: shrinks the refit of neurons that were rarely seen


class _DoneError(Exception):
    """Every site was seen: the rest of the forward is not needed."""


@verb
def warm_start(
    model: nn.Module,
    input_ids: Tensor | Mapping[str, Any],
    *,
    penalty: float = PENALTY,
    on_site: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Refit thresholds and down projections in place, layer by layer, before any training.

    Arguments:
        model: a calibrated model, not lowered (its routers are started).
        input_ids: [n, T] int64, or another model's one input, or a mapping of model inputs with an attention mask,
            whose padding is not seen; all run in one forward; as many as memory allows, and none that is kept for
            measuring.
        penalty: of each neuron's change, as a share of its energy.
        on_site: called with how many sites are done and the error of the last.
    Returns: each site's error |G (W + D) - H W|^2 / |H W|^2, by name. Weights change but for routers'; mode, training
        flags and hooks are as they were.
    Raises: NotTransformedError, LoweredError, ShardedError, CalibrationError, ConfigError (inactive="low_bit").
    Example:
        >>> errors = ltepass.warm_start(model, ids)
        >>> all(0 <= error < 1 for error in errors.values())
        True
    """
    routed = Routed.trained(model, "warm_start")
    require_whole(model, "warm_start")
    routed.require_gates("warm_start")
    routed.require_floats("warm_start")
    if not is_calibrated(routed):
        raise CalibrationError("warm_start needs started routers; call ltepass.calibrate(model, batches) first")
    batch = input_ids if isinstance(input_ids, Tensor) else mapping_of(input_ids)
    target = None if routed.config["budget"] == "model" else float(routed.config["target_sparsity"])
    calls = _calls(routed, batch)
    errors: dict[str, float] = {}

    def fitted(sites: list[FFNSite], error: float) -> None:
        for site in sites:
            errors[site.name] = error
            tell("refitting FFNs", len(errors), len(routed.sites))
            if on_site is not None:
                on_site(len(errors), error)
        if len(errors) == len(routed.sites):
            raise _DoneError

    fits = [_Fit(routed, sites, calls, target, penalty, fitted) for sites in _by_weights(routed.sites)]
    try:
        for fit in fits:
            fit.open()
        with mode_of(routed, "hard"), telling_tokens(routed):
            run_batches(model, [batch])
        for fit in fits:
            fit.finish()
    except _DoneError:
        pass
    finally:
        for fit in fits:
            fit.close()
    return errors


def _by_weights(sites: list[FFNSite]) -> list[list[FFNSite]]:
    """Sites that share their weights are fitted together."""
    groups: dict[tuple[NeuronRows, ...], list[FFNSite]] = {}
    for site in sites:
        groups.setdefault(site.neurons, []).append(site)
    return list(groups.values())


def _calls(routed: Routed, batch: Tensor | Mapping[str, object]) -> Counter[str]:
    """How often each site's router is called in a forward, by one of the first sequence alone: a fit waits for the last
    call.
    """
    calls: Counter[str] = Counter()
    first: Tensor | dict[str, object]
    if isinstance(batch, Tensor):
        first = batch[:1]
    else:
        n = next((len(v) for v in batch.values() if isinstance(v, Tensor)), 0)
        first = {name: v[:1] if isinstance(v, Tensor) and len(v) == n else v for name, v in batch.items()}
    handles = [router.register_forward_hook(lambda *_, name=site.name: calls.update([name])) for site, router in routed]
    try:
        run_batches(routed.model, [first])
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        require_seen({site.name: 0 for site in routed.sites})
    return calls


class _Fit:
    """One down projection, fitted once: at the last call, on the tokens of all calls of all sites that it serves.

    Earlier calls run as they are. A fit at each call would begin from what the one before made of the weights, and end
    with what suits the last call's inputs alone.
    """

    def __init__(
        self,
        routed: Routed,
        sites: list[FFNSite],
        calls: Counter[str],
        target: float | None,
        penalty: float,
        fitted: Callable[[list[FFNSite], float], None],
    ) -> None:
        self.model, self.sites, self.penalty, self.fitted = routed.model, sites, penalty, fitted
        self.weight = sites[0].down_rows.of(self.model, sites[0].d_ff).detach()  # a view
        self.left = max(1, sum(calls[site.name] for site in sites))
        self.thresholds = [_Threshold(s.name, routed.router(s), target, max(1, calls[s.name])) for s in sites]
        self.sums: list[Tensor] = []  # over calls: G^T G, G^T M of what is missing, M = (H - G) W, |M|^2 and |H W|^2
        self.handles: list[Any] = []

    def open(self) -> None:
        for threshold in self.thresholds:
            self.handles.append(threshold.router.register_forward_hook(threshold.on_logits))
            threshold.router.observer = partial(self.on_hidden, threshold.router)
        for down in {self.model.get_submodule(site.down) for site in self.sites}:
            self.handles.append(down.register_forward_hook(self.on_down))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        for threshold in self.thresholds:
            threshold.router.observer = None

    def on_hidden(self, router: Router, h: Tensor) -> None:
        self.router, self.h = router, tokens_of(router, h).float()

    def on_down(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """The hook of down: sums of gated and missing units, and at the last call the refitted output."""
        if self.left == 0:
            return None
        gated = tokens_of(self.router, args[0]).float()
        whole = self.h @ self.weight.float()
        missing = (self.h - gated) @ self.weight.float()
        del self.h
        with one_thread():
            gram, cross = gated.T @ gated, gated.T @ missing
        self._add(gram, cross, missing.double().square().sum(), whole.double().square().sum())
        self.left -= 1
        if self.left:
            return None
        change, error = self._solve()
        fixed: Tensor = out + (args[0].float() @ change).view_as(out).to(out.dtype)
        self.fitted(self.sites, error)
        return fixed

    def finish(self) -> None:
        """The refit, where the batch's forward had fewer calls than its first sequence's."""
        if self.left and self.sums:
            self.left = 0
            self.fitted(self.sites, self._solve()[1])

    def _add(self, *sums: Tensor) -> None:
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else list(sums)

    def _solve(self) -> tuple[Tensor, float]:
        """D, which the weights get, and the error: |M - G D|^2 = |M|^2 - D . G^T M - sum_j penalty_j |D_j|^2."""
        gram, cross, missing, whole = self.sums
        energy = gram.diagonal().clone()
        penalty = self.penalty * energy + 1e-3 * energy.mean() + 1e-12
        gram.diagonal().add_(penalty)
        with one_thread():
            change = torch.linalg.solve(gram, cross)
        left = missing - (change * cross).sum(dtype=torch.float64)
        left -= (penalty * change.square().sum(1)).sum(dtype=torch.float64)
        require_finite(self.sites[0].name, change)
        keep(self.weight)  # a sum cannot be taken back bit by bit
        self.weight.add_(change.to(self.weight.dtype))
        return change, float(left / whole)


class _Threshold:
    """Places one router's threshold at its last call, by the tokens of all; none moves alone with budget "model"."""

    def __init__(self, name: str, router: Router, target: float | None, calls: int) -> None:
        self.name, self.router, self.target, self.left = name, router, target, calls
        self.seen: list[Tensor] = []

    def on_logits(self, router: Router, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """The hook of the router: from the last call on, logits under the new threshold."""
        if self.target is None or self.left == 0:
            return logits
        self.seen.append(tokens_of(router, logits))
        self.left -= 1
        if self.left:
            return logits
        table = table_of(torch.cat(self.seen))
        require_finite(self.name, table)
        place_threshold(router, table, interpolate(table, self.target))
        return logits + (router.quantiles[0] - table[0])  # the bias may have moved
