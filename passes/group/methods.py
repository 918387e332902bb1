"""Which neurons become one expert (paper section 4.1): exactly balanced groups, as a permutation of the neurons."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError, ConfigError
from ltepass.passes.group.balanced_kmeans import balanced_kmeans
from ltepass.routed.sites import FFNSite, routers_of, state_of
from ltepass.routed.undo import reorder
from ltepass.routed.watching import Sample

DATA_DRIVEN = ("coactivation", "output_aware")
SMALL = 0.1  # of a token's mean |h|: how small below that is all the same


def grouping_permutation(
    method: str,
    *,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    sample: Sample | None,
    group_size: int,
    seed: int,
) -> Tensor:
    """up, gate: [d_ff, d_model]; down: [d_ff, d_model], one row per neuron -> [d_ff] int64, a permutation.

    sample: what the site saw, h in its present neuron order.
    New neuron i was neuron permutation[i]; expert e is new neurons [e * group_size, (e + 1) * group_size).
    Methods: identity; random; kmeans (the paper's, on rows of gate and up: by how far apart their products with tokens
    of unit length lie; without a sample, their directions); coactivation (log |h_j| over tokens: which neurons are
    large together); output_aware (log |h_j| ||down_j||: which matter to the output together). Logarithms, because a
    threshold asks which neurons are large, not how large the largest are. `examples/compare/oracle.py` compares them.
    Deterministic for a seed. Raises CalibrationError where a sample is needed and missing, ConfigError.
    """
    d_ff = up.shape[0]
    if method == "identity":
        return torch.arange(d_ff)
    if method == "random":
        return torch.randperm(d_ff, generator=torch.Generator().manual_seed(seed))
    if method not in ("kmeans", *DATA_DRIVEN):
        raise ConfigError(f"grouping is {method!r}; expected identity, random, kmeans, coactivation or output_aware")
    if method == "kmeans":
        rows = [w.float() for w in (gate, up) if w is not None]
        if sample is None:
            points = torch.cat([nn.functional.normalize(w, dim=1) for w in rows], 1)
        else:  # inputs have few large directions, and only along those does it matter how rows differ
            tokens = nn.functional.normalize(sample.x.float(), dim=1)
            points = torch.cat([w @ tokens.T for w in rows], 1)
    elif sample is None:
        raise CalibrationError(f"grouping {method!r} needs activations; expected calibration batches; pass them")
    elif method == "coactivation":
        points = _log_sizes(sample.h.float().abs()).T
    else:
        points = _log_sizes(sample.h.float().abs() * down.float().norm(dim=1)).T
    return balanced_kmeans(points.cpu(), group_size, seed=seed).argsort(stable=True)


def site_permutation(model: nn.Module, site: FFNSite, method: str, sample: Sample | None, seed: int) -> Tensor:
    """A method's permutation of one site's neurons; sample may be None for methods that need no data."""
    up, down = (rows.of(model, site.d_ff).detach() for rows in (site.up_rows, site.down_rows))
    gate = site.gate_rows.of(model, site.d_ff).detach() if site.gate_rows else None
    return grouping_permutation(
        method, up=up, gate=gate, down=down, sample=sample, group_size=site.group_size, seed=seed
    )


def _log_sizes(size: Tensor) -> Tensor:
    """[n_tokens, d_ff], relative to each token's mean."""
    mean = size.mean(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    return (size / mean + SMALL).log()


def permute_site(model: nn.Module, site: FFNSite, permutation: Tensor) -> None:
    """Reorder a site's neurons in place: every slice in `site.neurons`, and its routers' record of the order.

    Sites that share their weights have a router each: permute one of them, and all are done.

    permutation: [d_ff] int64; new neuron i is old neuron permutation[i]. Names, shapes and strides stay.
    """
    if sorted(permutation.tolist()) != list(range(site.d_ff)):
        raise ConfigError(f"{site.name}: expected a permutation of {site.d_ff} neurons")
    for rows in site.neurons:
        reorder(partial(rows.take, model.get_parameter(rows.param), site.d_ff), permutation)
    with torch.no_grad():
        state = state_of(model)
        for same in [s for s in state.sites if s.neurons == site.neurons] if state else []:
            for router in routers_of(model.get_submodule(same.router)):
                router.permutation.copy_(router.permutation[permutation.to(router.permutation.device)])
