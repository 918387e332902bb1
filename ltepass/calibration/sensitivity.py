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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltepass.calibration.energy import down_energy
from ltepass.errors import CalibrationError
from ltepass.routed.batches import Batch, inputs_of, is_empty
from ltepass.routed.modes import mode_of
from ltepass.routed.observers import require_finite, require_seen
from ltepass.routed.offloaded import fetched
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.routed.sites import FFNSite
from ltepass.routed.token_masks import TokenHooks, telling_tokens, tokens_of
from ltepass.routed.undo import verb

TOKENS = 2048  # enough for a mean over tokens and experts


@dataclass(frozen=True)
class Sensitivity:
    """Of one site: log_cost, of which only differences between sites mean something; neurons [d_ff] fp32."""

    log_cost: float
    neurons: Tensor


@verb
def loss_sensitivity(model: nn.Module, batches: Iterable[Batch], *, seed: int = 0) -> dict[str, Sensitivity]:
    """By site name, over the first 2,048 tokens of the batches, or as many as it takes to reach every FFN.

    batches: mappings of model inputs, or token id tensors; padding is not seen. The model must return an object with
    `logits` [B, T, V]. Leaves modes, training flags and gradients as they were. Raises NotTransformedError,
    LoweredError, CalibrationError.
    """
    return sensitivities(Routed.trained(model, "loss_sensitivity"), batches, seed=seed)


def sensitivities(routed: Routed, batches: Iterable[Batch], *, seed: int = 0) -> dict[str, Sensitivity]:
    """What `loss_sensitivity` returns: how much each FFN matters to the loss, by site name."""
    model = routed.model
    taps = [_Tap(model, site, router) for site, router in routed]
    flags = {m: m.training for m in model.modules()}
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    try:
        with mode_of(routed, "dense"), torch.enable_grad(), telling_tokens(routed) as hooks:
            for batch in batches:
                seen += 0 if is_empty(batch) else _one(model, batch, taps, hooks, generator)
                if seen >= TOKENS and all(tap.called for tap in taps):
                    break
    finally:
        for tap in taps:
            tap.close()
        for module, flag in flags.items():
            module.training = flag
    if seen == 0:
        raise CalibrationError("no batch with a token was given; expected at least one; pass batches of token ids")
    require_seen({tap.site.name: tap.called for tap in taps})
    return {tap.site.name: tap.found() for tap in taps}


def _one(model: nn.Module, batch: Batch, taps: list[_Tap], hooks: TokenHooks, generator: torch.Generator) -> int:
    """One batch into the taps; returns its tokens. Predictions at padding have no label, and so no loss."""
    args, named = inputs_of(model, batch)
    logits = getattr(model(*args, **named), "logits", None)
    if logits is None:
        raise CalibrationError(
            f'{type(model).__name__} returns no logits; budget "model" expects a model that predicts tokens; '
            'pass budget="layer"'
        )
    real = hooks.output.tokens(logits.shape[:-1])
    flat = (logits.flatten(0, -2) if real is None else logits[real]).float()
    called = [tap for tap in taps if tap.calls]
    probes = [call.probe for tap in called for call in tap.calls]
    if len(flat) == 0:
        for tap in called:
            tap.calls = []
    elif called:
        require_finite(type(model).__name__, flat)
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).flatten().to(flat.device)
        loss = nn.functional.cross_entropy(flat, drawn, reduction="sum")
        gradients = iter(torch.autograd.grad(loss, probes, allow_unused=True))
        for tap in called:
            tap.take([next(gradients) for _ in tap.calls])
    return len(flat)


class _Call(NamedTuple):
    """One call of an FFN: h [..., d_ff], and a zero with a gradient on its output."""

    h: Tensor
    probe: Tensor


class _Tap:
    """Adds a zero with a gradient to one FFN's output, and keeps its hidden units, of every call in a forward."""

    h: Tensor

    def __init__(self, model: nn.Module, site: FFNSite, router: Router) -> None:
        self.model, self.site, self.router = model, site, router
        self.calls: list[_Call] = []  # of the present forward
        self.called, self.log_cost, self.count, self.tokens = 0, 0.0, 0, 0
        self.neurons: Tensor | float = 0.0
        self.router.observer = self._keep
        self.handle = model.get_submodule(site.down).register_forward_hook(self._on_down)

    def _keep(self, h: Tensor) -> None:
        self.h = h.detach()

    def _on_down(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        probe = torch.zeros_like(out, requires_grad=True)
        self.calls.append(_Call(self.h, probe))
        return out + probe

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds log (g . E_e)^2, of what is not exactly 0, and (g . down_j)^2 / |g|^2, at every token of every call."""
        with fetched(self.model, self.site):
            down = self.site.down_rows.of(self.model, self.site.d_ff).float()  # [d_ff, d_out]
        for (h, probe), gradient in zip(self.calls, gradients, strict=True):
            g = tokens_of(self.router, torch.zeros_like(probe) if gradient is None else gradient).float()
            self._add(tokens_of(self.router, h).float(), g, down)
        self.calls, self.called = [], self.called + 1

    def _add(self, h: Tensor, g: Tensor, down: Tensor) -> None:
        projected = g @ down.T
        cost = (h * projected).unflatten(-1, (self.site.n_experts, -1)).sum(-1).square()
        logs = cost[cost > 0].log()
        self.log_cost += float(logs.double().sum())
        self.count += logs.numel()
        squares = g.square().sum(-1)
        seen = squares > 0
        self.neurons = self.neurons + (projected[seen].square() / squares[seen, None]).sum(0)
        self.tokens += int(seen.sum())

    def found(self) -> Sensitivity:
        """The site's two figures, over all tokens that were seen."""
        if not self.tokens:  # nothing reaches the output through this site
            return Sensitivity(-torch.inf, down_energy(self.model, self.site))
        d_out = self.site.down_rows.of(self.model, self.site.d_ff).shape[1]
        assert isinstance(self.neurons, Tensor), "a sum over the tokens that were seen"
        return Sensitivity(self.log_cost / max(self.count, 1), d_out / self.tokens * self.neurons)

    def close(self) -> None:
        self.handle.remove()
        self.router.observer = None
