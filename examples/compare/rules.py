"""The methods that LTE is compared with, each as one rule for one FFN: which hidden units take part, and how much.

A rule sees what the FFN sees (its input x, the gate's product, the hidden units h) and returns factors for h. Rules are
put on a transformed model in dense mode, so that every method runs on the same grouped weights and the same harness.
`bytes_share` is what a kernel that skips what the rule skips would read, the rule's own weights included, as a share of
the dense FFN's weight bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor, nn

from ltepass.calibration.energy import down_energy, expert_energy
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.routed.routed import router_of
from ltepass.routed.sites import FFNSite


@dataclass
class Seen:
    """One forward of one FFN: x [..., d_model]; gate [..., d_ff] before its activation (else h); h [..., d_ff]."""

    x: Tensor
    gate: Tensor
    h: Tensor


class Rule(nn.Module):
    """deployable: False where the decision needs what it wants to save. trainable: has a training of its own."""

    name = "dense"
    deployable = True

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__()
        self.site, self.sparsity = site, sparsity
        self.n_active = max(1, round((1 - sparsity) * site.n_experts))
        self.inactive: list[Tensor] = []  # share of unused hidden units, one value per forward in eval mode
        self.extra: Tensor | None = None  # an auxiliary loss of the last training forward

    def inputs(self, x: Tensor) -> Tensor:
        """What the up and gate linears see instead of x."""
        return x

    def factors(self, seen: Seen) -> Tensor:
        """[..., d_ff] or [..., 1]: what h is multiplied by; 0 is not read."""
        return torch.ones_like(seen.h[..., :1])

    def calibrate(self, model: nn.Module, x: Tensor, gate: Tensor, h: Tensor) -> None:
        """Fit what the rule needs to sampled tokens of training text: [n, d_model], [n, d_ff], [n, d_ff]."""

    def bytes_share(self, inactive: float) -> float:
        own = sum(p.numel() for p in self.parameters())
        matrices = 3 if self.site.gate else 2
        return 1.0 - inactive + own / (matrices * self.site.d_model * self.site.d_ff)

    def apply(self, seen: Seen) -> Tensor:  # type: ignore[override]  # nn.Module.apply is not used on rules
        factors = self.factors(seen)
        if not self.training:
            self.inactive.append((factors.detach() == 0).float().mean())
        return seen.h * factors


def spread(experts: Tensor, d_ff: int) -> Tensor:
    """[..., n_experts] -> [..., d_ff]: each expert's value for each of its neurons."""
    return experts.repeat_interleave(d_ff // experts.shape[-1], dim=-1)


def top(scores: Tensor, k: int) -> Tensor:
    """0/1 like scores: the k largest of the last dim."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)


def quantile(values: Tensor, q: float) -> float:
    """Of a sample: torch.quantile stops at 2^24 values."""
    flat = values.flatten()
    step = max(1, len(flat) // 1_000_000)
    return float(torch.quantile(flat[::step].float(), q))


class Cats(Rule):
    """CATS (2404.08763): a neuron is used where |act(gate)| is above its layer's quantile. The gate is read whole."""

    name = "cats"

    def calibrate(self, model: nn.Module, x: Tensor, gate: Tensor, h: Tensor) -> None:
        self.cut = quantile(self._size(Seen(x, gate, h)), self.sparsity)

    def _size(self, seen: Seen) -> Tensor:
        return (ACTIVATIONS[self.site.activation](seen.gate) if self.site.gate else seen.h).abs()

    def factors(self, seen: Seen) -> Tensor:
        return (self._size(seen) > self.cut).to(seen.h.dtype)

    def bytes_share(self, inactive: float) -> float:
        return (1 + 2 * (1 - inactive)) / 3 if self.site.gate else (1 + (1 - inactive)) / 2


class Teal(Rule):
    """TEAL (2408.14690) on the FFN: entries of x and of h below their quantile are dropped, and with them columns of
    gate and up, and of down."""

    name = "teal"

    def calibrate(self, model: nn.Module, x: Tensor, gate: Tensor, h: Tensor) -> None:
        self.cut_x, self.cut_h = quantile(x.abs(), self.sparsity), quantile(h.abs(), self.sparsity)

    def inputs(self, x: Tensor) -> Tensor:
        kept = x.abs() > self.cut_x
        if not self.training:
            self.inactive.append((~kept).float().mean())
            if self.site.gate:  # x enters two matrices, h one
                self.inactive.append((~kept).float().mean())
        return x * kept

    def factors(self, seen: Seen) -> Tensor:
        return (seen.h.abs() > self.cut_h).to(seen.h.dtype)


class TrainedTeal(Teal):
    """TEAL's cuts from the first training step on: what `lte+cuts` would be without routers."""

    name = "teal-trained"


class Oracle(Rule):
    """The experts with most energy, known only after they were computed: what any router could reach at best."""

    name = "oracle"
    deployable = False

    def calibrate(self, model: nn.Module, x: Tensor, gate: Tensor, h: Tensor) -> None:
        self.down_square = down_energy(model, self.site)

    def factors(self, seen: Seen) -> Tensor:
        energy = expert_energy(self.site, seen.h, self.down_square)
        return spread(top(energy, self.n_active), self.site.d_ff).to(seen.h.dtype)


class RandomExperts(Rule):
    """Top-k of a random linear router: as many experts as the others, chosen by the token and for no reason."""

    name = "random"

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__(model, site, sparsity)
        generator = torch.Generator().manual_seed(crc32(site.name.encode()))
        weight = torch.randn(site.n_experts, site.d_model, generator=generator)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def factors(self, seen: Seen) -> Tensor:
        scores = seen.x.detach().float() @ self.weight.T
        return spread(top(scores, self.n_active), self.site.d_ff).to(seen.h.dtype)


class TopK(Rule):
    """LTE's router from its calibrated start, but the k best experts of every token instead of a threshold."""

    name = "topk"

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__(model, site, sparsity)
        router = router_of(model, site)
        self.weight = nn.Parameter(router.weight.detach().clone(), requires_grad=False)
        assert router.bias is not None
        self.bias = nn.Parameter(router.bias.detach().clone(), requires_grad=False)

    def logits(self, seen: Seen) -> Tensor:
        return nn.functional.linear(seen.x.float(), self.weight, self.bias)

    def factors(self, seen: Seen) -> Tensor:
        return spread(top(self.logits(seen), self.n_active), self.site.d_ff).to(seen.h.dtype)


class NoisyTopK(TopK):
    """Shazeer's gate (1701.06538): noise on the logits in training, softmax over the k best, experts weighted by it
    (times k, so that equal weights leave the FFN as it is), and its importance loss."""

    name = "noisy-topk"
    coefficient = 0.01
    start = (
        0.05  # of the calibrated logits: the same experts as `topk`, of nearly equal weights, as near to the dense FFN
    )

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__(model, site, sparsity)
        with torch.no_grad():
            self.weight.mul_(self.start)
            self.bias.mul_(self.start)
        self.weight.requires_grad_(True)
        self.bias.requires_grad_(True)
        self.noise = nn.Parameter(torch.zeros_like(self.weight))

    def factors(self, seen: Seen) -> Tensor:
        logits = self.logits(seen)
        if self.training:
            deviation = self.start * nn.functional.softplus(nn.functional.linear(seen.x.float(), self.noise) - 2.0)
            logits = logits + torch.randn_like(logits) * deviation
        best = top(logits.detach(), self.n_active)
        share = logits.masked_fill(best == 0, -torch.inf).softmax(-1)
        importance = share.flatten(0, -2).sum(0)
        self.extra = self.coefficient * importance.var() / importance.mean().square()
        return spread(share * self.n_active, self.site.d_ff).to(seen.h.dtype)

    def bytes_share(self, inactive: float) -> float:
        noise = self.noise.numel() / ((3 if self.site.gate else 2) * self.site.d_model * self.site.d_ff)
        return super().bytes_share(inactive) - noise  # not read at inference


class PrunePath(TopK):
    """PrunePath (2605.28283): softmax over the router's logits, experts kept by falling score up to a cumulative mass,
    which is set on training text to meet the target; load-balance loss. Routers learn through the kept scores: not x
    through them, and each score relative to itself, else gradients grow with every layer."""

    name = "prunepath"
    coefficient = 0.01

    def __init__(self, model: nn.Module, site: FFNSite, sparsity: float) -> None:
        super().__init__(model, site, sparsity)
        self.weight.requires_grad_(True)
        self.bias.requires_grad_(True)
        self.mass = 1.0 - sparsity

    def calibrate(self, model: nn.Module, x: Tensor, gate: Tensor, h: Tensor) -> None:
        """The mass at which the target share of experts is left out on average, by bisection."""
        with torch.no_grad():
            share = self.logits(Seen(x, gate, h)).softmax(-1)
        low, high = 0.0, 1.0
        for _ in range(30):
            self.mass = (low + high) / 2
            if float(1.0 - self._kept(share).mean()) > self.sparsity:
                low = self.mass
            else:
                high = self.mass

    def _kept(self, share: Tensor) -> Tensor:
        ordered, order = share.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # an expert is kept while the mass before it is below the cut
        return torch.zeros_like(share).scatter(-1, order, (before < self.mass).to(share.dtype))

    def factors(self, seen: Seen) -> Tensor:
        scores = self.logits(replace(seen, x=seen.x.detach())).log_softmax(-1)
        share = scores.exp()
        kept = self._kept(share.detach())
        load = kept.flatten(0, -2).mean(0)
        self.extra = self.coefficient * len(load) * (load / load.sum() * share.flatten(0, -2).mean(0)).sum()
        through = kept + kept * (scores - scores.detach())  # value kept, gradient of the scores
        return spread(through, self.site.d_ff).to(seen.h.dtype)
