"""Losses, FFN sparsity and bytes of a model or of one under a rule, text by text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.compare.rule_hooks import Ruled
from ltepass.measure.quality import perplexity, token_losses
from ltepass.measure.token_bytes import router_share
from ltepass.routed.routed import router_of


def perplexities(model: Any, test: dict[str, Tensor]) -> dict[str, float]:
    return {name: perplexity(model, blocks) for name, blocks in test.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass(frozen=True, kw_only=True)
class OnText:
    """losses: [n, T - 1] in nats, a row a block; sparsity: of the FFNs; bytes_share: of their weights, read a token."""

    losses: Tensor
    sparsity: float = 0.0
    bytes_share: float = 1.0

    def perplexity(self, blocks: int | None = None) -> float:
        """Of so many blocks at the beginning, or of all."""
        return math.exp(float(self.losses[:blocks].mean()))


Measured = dict[str, OnText]  # by text


def measure_dense(model: Any, test: dict[str, Tensor]) -> Measured:
    return {name: OnText(losses=token_losses(model, blocks)) for name, blocks in test.items()}


def measure_rule(ruled: Ruled, test: dict[str, Tensor]) -> Measured:
    found: Measured = {}
    ruled.model.eval()
    with ruled:
        for name, blocks in test.items():
            ruled.reset()
            losses = token_losses(ruled.model, blocks)
            sparsity, read = ruled.measured()
            found[name] = OnText(losses=losses, sparsity=sparsity, bytes_share=read)
    return found


@torch.no_grad()
def measure_lte(model: Any, test: dict[str, Tensor]) -> Measured:
    own = router_share(model, model._lte.sites)
    routers = [router_of(model, site) for site in model._lte.sites]
    found: Measured = {}
    for name, blocks in test.items():
        shares: list[Tensor] = []
        handles = [r.register_forward_hook(_keep_share(shares)) for r in routers]
        losses = token_losses(model, blocks)
        for handle in handles:
            handle.remove()
        sparsity = float(torch.stack(shares).mean())
        found[name] = OnText(losses=losses, sparsity=sparsity, bytes_share=1.0 - sparsity + own)
    return found


def _keep_share(shares: list[Tensor]) -> Any:
    return lambda router, args, logits: shares.append((logits <= router.threshold).float().mean())
