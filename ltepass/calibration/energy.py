"""The energy of experts, what leaving them out takes from an FFN's output, and its fit as a function of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.calibration.ridge import RidgeSums
from ltepass.config import Mode
from ltepass.routed.observers import Observer, require_finite, watch
from ltepass.routed.offloaded import fetched
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.samples import SAMPLE_TOKENS, Reservoir, turns
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
    with fetched(model, site):
        return site.down_rows.of(model, site.d_ff).detach().float().square().sum(1)


@dataclass
class EnergyFit:
    """Linear fit of the log energy of a site's experts, and its values on a sample of what it was fitted to.

    mean_log: of the energies that are not exactly 0.
    """

    weight: Tensor
    bias: Tensor
    logits: Tensor
    mean_log: float

    def scaled(self, scale: float, offset: float) -> EnergyFit:
        return EnergyFit(scale * self.weight, scale * self.bias + offset, scale * self.logits + offset, self.mean_log)


class _EnergySeen(Observer):
    """Regression of the log energy of one site's experts on its input; keeps SAMPLE_TOKENS inputs."""

    def __init__(self, site: FFNSite, router: Router, weights: Tensor) -> None:
        super().__init__(site, router)
        self.weights, self.kept, self.sums = weights, Reservoir(SAMPLE_TOKENS), RidgeSums()
        self.log_sum, self.count = (torch.zeros((), dtype=torch.float64, device=weights.device) for _ in range(2))

    def on_input(self, x: Tensor) -> None:
        self.x = x.float()
        self.kept.add(x.to(torch.bfloat16))

    def on_hidden(self, h: Tensor) -> None:
        """The log energy of every expert at these tokens goes into the regression."""
        energy = expert_energy(self.site, h, self.weights)
        logs = log_energy(energy)
        self.sums.add(self.x, logs)
        del self.x
        self.log_sum += logs.where(energy > 0, 0.0).sum(dtype=torch.float64)  # in fp32 its bits follow the threads
        self.count += (energy > 0).sum()

    def fit(self) -> EnergyFit:
        """The regression's solution, and what it gives for the inputs that were kept; once, for the sums go."""
        weight, bias = self.sums.solve()
        require_finite(self.site.name, weight, bias)
        logits = self.kept.rows().float() @ weight.T + bias
        del self.sums, self.kept
        return EnergyFit(weight, bias, logits, float(self.log_sum / self.count.clamp_min(1)))


def fit_energies(
    routed: Routed, batches: Sequence[Any], weights: dict[str, Tensor], mode: Mode
) -> dict[str, EnergyFit]:
    """By site name: the log energies of its experts, fitted on every token of the batches as the FFNs see it in this
    mode. Of a large model a few sites a pass, so that their sums fit into memory.
    """
    fits: dict[str, EnergyFit] = {}
    for turn in turns(list(routed), len(routed.sites), lambda one: _bytes(one[0])):
        observers = [_EnergySeen(site, router, weights[site.name]) for site, router in turn]
        watch(routed, batches, observers, mode=mode)
        fits |= {o.site.name: o.fit() for o in observers}
    return fits


def _bytes(site: FFNSite) -> int:
    """Of what is kept of one site: sums in fp32, and inputs in bfloat16."""
    return 4 * site.d_model * (site.d_model + site.n_experts) + 2 * site.d_model * SAMPLE_TOKENS
