"""Methods that predict after the fact, with a small network, what an FFN will need: MoEfication and Deja Vu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.compare.rules import Rule, Seen, spread, top
from ltepass.calibration.energy import down_energy, expert_energy
from ltepass.routed.sites import FFNSite


class Predictor(Rule):
    """A small network fitted after the fact to predict what matters, from x. Subclasses say what it predicts."""

    steps, batch, learning_rate = 600, 256, 3e-3

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float, outputs: int, rank: int) -> None:
        super().__init__(model, site, sparsity)
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.inner = nn.Linear(site.d_model, rank, bias=False)
        self.net = nn.Sequential(self.inner, self.activation(), nn.Linear(rank, outputs))
        torch.random.set_rng_state(state)
        self.net.requires_grad_(False)

    activation: Any = nn.Identity

    def labels(self, model: nn.Module, h: Tensor) -> Tensor:
        raise NotImplementedError

    def calibrate(self, model: nn.Module, x: Tensor, gate: Tensor, h: Tensor) -> None:
        with torch.enable_grad():
            self._fit(x, self.labels(model, h))

    def _fit(self, x: Tensor, labels: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        scale = x.std(0).clamp_min(1e-6)  # folded into the first layer afterwards
        self.net.requires_grad_(True)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=self.learning_rate)
        for _ in range(self.steps):
            rows = torch.randint(len(x), (self.batch,), generator=generator).to(x.device)
            loss = nn.functional.binary_cross_entropy_with_logits(self.net(x[rows] / scale), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.net.requires_grad_(False)
        self.inner.weight.div_(scale)


class MoEfication(Predictor):
    """MoEfication (2110.01786): a post-hoc MLP router (tanh) predicts each expert's share of the token's largest."""

    name = "moefication"
    activation = nn.Tanh

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__(model, site, sparsity, site.n_experts, rank=min(128, site.d_model))

    def labels(self, model: nn.Module, h: Tensor) -> Tensor:
        size = expert_energy(self.site, h, down_energy(model, self.site)).sqrt()
        return size / size.max(dim=-1, keepdim=True).values.clamp_min(1e-12)

    def factors(self, seen: Seen) -> Tensor:
        return spread(top(self.net(seen.x.float()), self.n_active), self.site.d_ff).to(seen.h.dtype)


class DejaVu(Predictor):
    """Deja Vu (2310.17157): a low-rank predictor of which single neurons are among the token's most important."""

    name = "dejavu"

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__(model, site, sparsity, site.d_ff, rank=max(1, min(96, site.d_model // 4)))
        self.n_neurons = max(1, round((1 - sparsity) * site.d_ff))

    def labels(self, model: nn.Module, h: Tensor) -> Tensor:
        norm = self.site.down_rows.of(model, self.site.d_ff).detach().float().norm(dim=1)
        return top(h.float().abs() * norm, self.n_neurons)

    def factors(self, seen: Seen) -> Tensor:
        return top(self.net(seen.x.float()), self.n_neurons).to(seen.h.dtype)
