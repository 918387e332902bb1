"""How much each FFN matters to the model's output: what lets one threshold serve them all.

To leave expert e out at a token changes the FFN's output by -E_e(x), and the output distribution by, to second order,

    KL = 1/2 (g . E_e(x))^2,    g the gradient, at the FFN's output, of the loss of labels drawn from the model itself

(the Fisher information, after Optimal Brain Damage). Two figures of each site come from it, by one forward and one
backward pass in which no parameter gets a gradient:

    log_cost   the mean of log (g . E_e)^2 over tokens and experts: how sites compare
    neurons    the mean of (g . down_j)^2 / |g|^2 over tokens: which neurons of a site write where the loss looks.
               They stand for |down_j|^2 in its experts' energies, sum of h_j^2 |down_j|^2, and would equal it if
               gradients had no preferred direction

Logarithms and unit gradients, because of the massive activations that a few tokens have in a few layers: they decide an
arithmetic mean alone, which on SmolLM2-135M switched a whole FFN off. What one budget is worth after training stands in
the ablations (examples/results/ablations.md, "recipe").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.energy import down_energy
from ltepass.errors import CalibrationError
from ltepass.observing import require_seen
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import mode_of
from ltepass.undo import verb

TOKENS = 2048  # enough for a mean over tokens and experts


@dataclass(frozen=True)
class Sensitivity:
    """Of one site: log_cost, of which only differences between sites mean something; neurons [d_ff] fp32."""

    log_cost: float
    neurons: Tensor


@verb
def loss_sensitivity(model: nn.Module, batches: Iterable[Any], *, seed: int = 0) -> dict[str, Sensitivity]:
    """By site name, over the first 2,048 tokens of the batches, or as many as it takes to reach every FFN.

    batches: dicts of model inputs, or token id tensors. The model must return an object with `logits` [B, T, V].
    Leaves modes, training flags and gradients as they were. Raises NotTransformedError, CalibrationError.
    """
    sites = require_state(model, "loss_sensitivity").sites
    taps = [_Tap(model, site) for site in sites]
    flags = {m: m.training for m in model.modules()}
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    try:
        with mode_of(model, "dense"), torch.enable_grad():
            for batch in batches:
                seen += _one(model, batch, taps, generator)
                if seen >= TOKENS and all(tap.called for tap in taps):
                    break
    finally:
        for tap in taps:
            tap.close()
        for module, flag in flags.items():
            module.training = flag
    if seen == 0:
        raise CalibrationError("no batch was given; expected at least one; pass batches of token ids")
    require_seen({tap.site.name: tap.called for tap in taps})
    return {tap.site.name: tap.found() for tap in taps}


def _one(model: nn.Module, batch: Any, taps: list[_Tap], generator: torch.Generator) -> int:
    """One batch into the taps; returns its tokens."""
    inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else None
    logits = getattr(model(batch) if inputs is None else model(**inputs), "logits", None)
    if logits is None:
        raise CalibrationError(
            f'{type(model).__name__} returns no logits; budget "model" expects a model that predicts tokens; '
            'pass budget="layer"'
        )
    flat = logits.flatten(0, -2).float()
    drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).flatten().to(flat.device)
    loss = nn.functional.cross_entropy(flat, drawn, reduction="sum")
    called = {tap: tap.probe for tap in taps if tap.probe is not None}
    if called:
        for tap, gradient in zip(called, torch.autograd.grad(loss, list(called.values())), strict=True):
            tap.take(gradient)
    return len(flat)


class _Tap:
    """Adds a zero with a gradient to one FFN's output, and keeps its hidden units."""

    probe: Tensor | None = None  # of the present forward
    called = 0
    h: Tensor

    def __init__(self, model: nn.Module, site: FFNSite) -> None:
        self.model, self.site, self.router = model, site, router_of(model, site)
        self.log_cost, self.count, self.neurons, self.tokens = 0.0, 0, torch.zeros(()), 0
        self.router.observer = self._keep
        self.handle = model.get_submodule(site.down).register_forward_hook(self._on_down)

    def _keep(self, h: Tensor) -> None:
        self.h = h.detach().flatten(0, -2).float()

    def _on_down(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        self.probe = torch.zeros_like(out, requires_grad=True)
        return out + self.probe

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Adds log (g . E_e)^2, of what is not exactly 0, and (g . down_j)^2 / |g|^2."""
        self.called, self.probe = self.called + 1, None
        down = self.site.down_rows.of(self.model, self.site.d_ff).float()  # [d_ff, d_out]
        g = gradient.flatten(0, -2).float()
        projected = g @ down.T
        cost = (self.h * projected).unflatten(-1, (self.site.n_experts, -1)).sum(-1).square()
        logs = cost[cost > 0].log()
        self.log_cost += float(logs.sum())
        self.count += logs.numel()
        squares = g.square().sum(-1)
        seen = squares > 0
        self.neurons = self.neurons + (projected[seen].square() / squares[seen, None]).sum(0)
        self.tokens += int(seen.sum())

    def found(self) -> Sensitivity:
        if not self.tokens:  # nothing reaches the output through this site
            return Sensitivity(-torch.inf, down_energy(self.model, self.site))
        d_out = self.site.down_rows.of(self.model, self.site.d_ff).shape[1]
        return Sensitivity(self.log_cost / max(self.count, 1), d_out / self.tokens * self.neurons)

    def close(self) -> None:
        self.handle.remove()
        self.router.observer = None
