"""How much each FFN matters to the model's output: what lets one threshold serve them all.

To leave expert e out at a token changes the FFN's output by -E_e(x), and the output distribution by, to second order,

    KL = 1/2 (g . E_e(x))^2,    g the gradient, at the FFN's output, of the loss of labels drawn from the model itself

(the Fisher information, after Optimal Brain Damage). A site's sensitivity is the geometric mean, over tokens and
experts, of (g . E_e)^2 over the expert's energy, sum of |h_j|^2 |down_j|^2: what energies of different FFNs are
multiplied by to compare them. One forward and one backward pass; no parameter gets a gradient.

The geometric mean, because of the massive activations that a few tokens have in a few layers: they decide an arithmetic
one alone, which on SmolLM2-135M switched a whole FFN off. What it is worth after training stands in the ablations
(examples/results/ablations.md, "recipe").
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ltepass.errors import CalibrationError
from ltepass.sites import FFNSite, require_state, router_of
from ltepass.sparsity import mode_of

TOKENS = 2048  # enough for a mean over tokens and experts


def loss_sensitivity(model: nn.Module, batches: Iterable[Any], *, seed: int = 0) -> dict[str, float]:
    """By site name, over the first 2,048 tokens of the batches; only ratios between sites mean something.

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
                if seen >= TOKENS:
                    break
    finally:
        for tap in taps:
            tap.close()
        for module, flag in flags.items():
            module.training = flag
    if seen == 0:
        raise CalibrationError("no batch was given; expected at least one; pass batches of token ids")
    return {tap.site.name: math.exp(tap.log_ratio / max(tap.count, 1)) for tap in taps}


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
    gradients = torch.autograd.grad(loss, [tap.probe for tap in taps])
    for tap, gradient in zip(taps, gradients, strict=True):
        tap.take(gradient)
    return len(flat)


class _Tap:
    """Adds a zero with a gradient to one FFN's output, and keeps its hidden units."""

    probe: Tensor
    h: Tensor

    def __init__(self, model: nn.Module, site: FFNSite) -> None:
        self.model, self.site, self.router = model, site, router_of(model, site)
        self.log_ratio, self.count = 0.0, 0
        self.router.observer = self._keep
        self.handle = model.get_submodule(site.down).register_forward_hook(self._on_down)

    def _keep(self, h: Tensor) -> None:
        self.h = h.detach().flatten(0, -2).float()

    def _on_down(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        self.probe = torch.zeros_like(out, requires_grad=True)
        return out + self.probe

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Adds log (g . E_e)^2 / |E_e|^2 over tokens and experts; what is exactly 0 says nothing."""
        down = self.site.down_rows.of(self.model, self.site.d_ff).float()  # [d_ff, d_out]
        projected = gradient.flatten(0, -2).float() @ down.T
        cost = self._by_expert(self.h * projected).square()
        energy = self._by_expert(self.h.square() * down.square().sum(1))
        ratio = (cost / energy)[(cost > 0) & (energy > 0)].log()
        self.log_ratio += float(ratio.sum())
        self.count += ratio.numel()

    def _by_expert(self, neurons: Tensor) -> Tensor:
        experts: Tensor = neurons.unflatten(-1, (self.site.n_experts, -1)).sum(-1)
        return experts

    def close(self) -> None:
        self.handle.remove()
        self.router.observer = None
