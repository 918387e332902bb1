"""Quality on held-out text: perplexity, and the share of neurons that each layer's router leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import NotTransformedError
from ltepass.router import Router
from ltepass.sites import state_of


@torch.no_grad()
def perplexity(model: Any, blocks: Tensor) -> float:
    """exp of the mean cross-entropy in nats over every next token of blocks [n, T] int64, one block at a time."""
    total = 0.0
    for block in blocks.to(model.device):
        logits = model(input_ids=block[None]).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


@torch.no_grad()
def hard_sparsity(model: Any, blocks: Tensor, skip: int = 0) -> dict[str, float]:
    """Share of inactive neurons by site name over tokens skip.. of blocks [n, T]; the model must be in hard mode."""
    with count_inactive(model, skip) as counts:
        for block in blocks.to(model.device):
            model(input_ids=block[None], use_cache=False)
    return {name: inactive / seen for name, (inactive, seen) in counts.items()}


@contextmanager
def count_inactive(model: nn.Module, skip: int = 0) -> Iterator[dict[str, tuple[int, int]]]:
    """Counts (inactive experts, decisions) by site name while it is open; experts of a site are all of one size."""
    state = state_of(model)
    if state is None:
        raise NotTransformedError(f"{type(model).__name__} holds no routers; there is no sparsity to measure")
    counts: dict[str, tuple[int, int]] = {site.name: (0, 0) for site in state.sites}

    def hook(name: str) -> Any:
        def count(router: Router, _: Any, logits: Tensor) -> None:
            active = logits[..., skip:, :] > router.threshold
            inactive, seen = counts[name]
            counts[name] = (inactive + int(active.numel() - active.sum()), seen + active.numel())

        return count

    handles = [model.get_submodule(s.router).register_forward_hook(hook(s.name)) for s in state.sites]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
