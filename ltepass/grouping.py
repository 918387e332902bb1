"""Which neurons become one expert (paper section 4.1): exactly balanced groups, as a permutation of the neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltepass.balanced import balanced_kmeans
from ltepass.errors import CalibrationError, ConfigError
from ltepass.sites import FFNSite, routers_of

SKETCH = 512  # width of the random sketch that stands for outer products of activation and down column


@dataclass(frozen=True)
class ActivationStats:
    """Hidden units of sampled calibration tokens: [n_tokens, d_ff], fp32, in the site's present neuron order."""

    h: Tensor


def grouping_permutation(
    method: str,
    *,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activations: ActivationStats | None,
    group_size: int,
    seed: int,
) -> Tensor:
    """up, gate: [d_ff, d_model]; down: [d_ff, d_model], one row per neuron -> [d_ff] int64, a permutation.

    New neuron i was neuron permutation[i]; expert e is new neurons [e * group_size, (e + 1) * group_size).
    Methods: identity; random; kmeans (the paper: rows of gate, or of up in a plain FFN, L2-normalised); coactivation
    (|h_j| ||down_j|| over tokens, normalised); output_aware (the neurons' output vectors h_j down_j over tokens).
    Deterministic for a seed. Raises CalibrationError where activations are needed and missing, ConfigError.
    """
    d_ff = up.shape[0]
    if method == "identity":
        return torch.arange(d_ff)
    if method == "random":
        return torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))
    if method not in ("kmeans", "coactivation", "output_aware"):
        raise ConfigError(f"grouping is {method!r}; expected identity, random, kmeans, coactivation or output_aware")
    if method == "kmeans":
        points = (up if gate is None else gate).float()
    elif activations is None:
        raise CalibrationError(f"grouping {method!r} needs activations; expected calibration batches; pass them")
    elif method == "coactivation":
        points = activations.h.abs().T * down.float().norm(dim=1, keepdim=True)
    else:
        points = _output_sketch(activations.h, down.float(), seed)
    labels = balanced_kmeans(nn.functional.normalize(points, dim=1), group_size, seed=seed)
    return labels.argsort(stable=True)


def _output_sketch(h: Tensor, down: Tensor, seed: int) -> Tensor:
    """[d_ff, SKETCH] whose inner products are those of the outer products h_j (x) down_j, in expectation."""
    random = torch.Generator().manual_seed(seed)
    over_tokens = torch.randn(h.shape[0], SKETCH, generator=random)
    over_width = torch.randn(down.shape[1], SKETCH, generator=random)
    return (h.T @ over_tokens) * (down @ over_width) / SKETCH**0.5


def permute_site(model: nn.Module, site: FFNSite, permutation: Tensor) -> None:
    """Reorder a site's neurons in place: every slice in `site.neurons`, and the router's record of the order.

    permutation: [d_ff] int64; new neuron i is old neuron permutation[i]. Names, shapes and strides stay.
    """
    if sorted(permutation.tolist()) != list(range(site.d_ff)):
        raise ConfigError(f"{site.name}: expected a permutation of {site.d_ff} neurons")
    with torch.no_grad():
        for rows in site.neurons:
            slice_ = rows.of(model, site.d_ff)
            slice_.copy_(slice_[permutation.to(slice_.device)].clone())
        parent, _, child = site.router.rpartition(".")
        if hasattr(model.get_submodule(parent), child):
            for router in routers_of(model.get_submodule(site.router)):
                router.permutation.copy_(router.permutation[permutation.to(router.permutation.device)])
