"""Perplexity, FFN sparsity and bytes of a model or of one under a rule, text by text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from examples.compare.rule_hooks import Ruled
from ltepass.measure.quality import perplexity
from ltepass.measure.token_bytes import router_share
from ltepass.routed.routed import router_of


def perplexities(model: Any, test: dict[str, Tensor]) -> dict[str, float]:
    return {name: perplexity(model, blocks) for name, blocks in test.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


Measured = tuple[dict[str, float], dict[str, float], dict[str, float]]  # perplexity, FFN sparsity, bytes share by text


def measure_rule(ruled: Ruled, test: dict[str, Tensor]) -> Measured:
    ppl, sparsity, read = {}, {}, {}
    ruled.model.eval()
    with ruled:
        for name, blocks in test.items():
            ruled.reset()
            ppl[name] = perplexity(ruled.model, blocks)
            sparsity[name], read[name] = ruled.measured()
    return ppl, sparsity, read


@torch.no_grad()
def measure_lte(model: Any, test: dict[str, Tensor]) -> Measured:
    own = router_share(model, model._lte.sites)
    routers = [router_of(model, site) for site in model._lte.sites]
    ppl, sparsity = {}, {}
    for name, blocks in test.items():
        shares: list[Tensor] = []
        handles = [r.register_forward_hook(_keep_share(shares)) for r in routers]
        ppl[name] = perplexity(model, blocks)
        for handle in handles:
            handle.remove()
        sparsity[name] = float(torch.stack(shares).mean())
    return ppl, sparsity, {n: 1.0 - s + own for n, s in sparsity.items()}


def _keep_share(shares: list[Tensor]) -> Any:
    return lambda router, args, logits: shares.append((logits <= router.threshold).float().mean())
