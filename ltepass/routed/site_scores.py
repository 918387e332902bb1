"""How routers' logits lie around their thresholds, and which experts that leaves: of a text, or of the calibration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltepass.routed import token_masks
from ltepass.routed.batches import Batch, run_batches
from ltepass.routed.modes import mode_of
from ltepass.routed.observers import on_logits, require_seen
from ltepass.routed.quantile_table import table_of, table_tokens
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import Reservoir
from ltepass.routed.sites import FFNSite


@dataclass(frozen=True, kw_only=True)
class SiteScores:
    """Of one site's router.

    threshold: experts are active above this logit; None: all are, whatever theirs.
    quantiles: the logits that 0 %, 1 %, ... 100 % lie at or below. tokens: that were seen; 0: the calibration's table.
    use: share of the tokens that each expert was active for, in order; empty where none were seen.
    """

    threshold: float | None
    quantiles: list[float]
    tokens: int = 0
    use: list[float] | None = None

    @property
    def inactive(self) -> float:
        """Share of experts, over all tokens: measured, or what the table says that the threshold leaves."""
        if self.use is not None:
            return 1 - sum(self.use) / len(self.use)
        below = [value for value in self.quantiles if self.threshold is not None and value <= self.threshold]
        return max(0, len(below) - 1) / (len(self.quantiles) - 1)

    @property
    def dead(self) -> list[int]:
        """Experts that no token used."""
        return [number for number, share in enumerate(self.use or ()) if share == 0]

    @property
    def always_on(self) -> list[int]:
        """Experts that every token used."""
        return [number for number, share in enumerate(self.use or ()) if share == 1]


def calibrated_scores(routed: Routed) -> dict[str, SiteScores]:
    """By site name, from the tables; a site without one is left out."""
    return {
        site.name: SiteScores(threshold=_threshold(router), quantiles=router.quantiles.tolist())
        for site, router in routed
        if not router.quantiles.is_meta and not bool(router.quantiles.isnan().any())
    }


def measured_scores(routed: Routed, batches: Iterable[Batch]) -> dict[str, SiteScores]:
    """By site name, of all tokens of the batches, in hard mode. Raises CalibrationError where a site saw none."""
    kept = {site.name: Reservoir(table_tokens(site.n_experts)) for site in routed.sites}
    counts: dict[str, Tensor] = {}
    tokens = dict.fromkeys(kept, 0)

    def see(site: FFNSite, router: Router, logits: Tensor) -> None:
        rows = token_masks.tokens_of(router, logits)
        kept[site.name].add(rows)
        tokens[site.name] += len(rows)
        active = (rows > router.threshold).sum(0)
        counts[site.name] = counts[site.name] + active if site.name in counts else active

    with mode_of(routed, "hard"), on_logits(routed, see):
        run_batches(routed.model, batches)
    require_seen(tokens)
    return {
        site.name: SiteScores(
            threshold=_threshold(router),
            quantiles=table_of(kept[site.name].rows()).tolist(),
            tokens=tokens[site.name],
            use=(counts[site.name] / tokens[site.name]).tolist(),
        )
        for site, router in routed
    }


def _threshold(router: Router) -> float | None:
    value = float(router.threshold)
    return None if value == -torch.inf else value


def ranges(numbers: Iterable[int]) -> str:
    """`3, 17-19`: of ascending numbers, in few words."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
