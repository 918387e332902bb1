"""The energy of experts: what leaving them out takes from an FFN's output."""

from __future__ import annotations

from torch import Tensor, nn

from ltepass.routed.sites import FFNSite

MAX_LOG_OFFSET = 70.0  # between a log cost and the mean of log energies: an FFN that the output does not hear has none


def expert_energy(site: FFNSite, h: Tensor, weights: Tensor) -> Tensor:
    """[..., n_experts]: sum over an expert's neurons of h_j^2 weights_j; h [..., d_ff], weights [d_ff]."""
    energy: Tensor = (h.float().square() * weights).unflatten(-1, (site.n_experts, -1)).sum(-1)
    return energy


def log_energy(energy: Tensor) -> Tensor:
    return energy.clamp_min(1e-12).log()


def down_energy(model: nn.Module, site: FFNSite) -> Tensor:
    """[d_ff]: |down_j|^2, what a unit of h_j^2 adds to the energy of the FFN's output."""
    return site.down_rows.of(model, site.d_ff).detach().float().square().sum(1)
