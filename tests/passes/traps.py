"""What looks like an FFN and is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.passes.ffn_forms import D, H, Plain


class Attention(nn.Module):
    """Query, key and value as wide as an FFN's hidden units: h = softmax(q k) v, perhaps gated; an output linear."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, H) for _ in range(3))
        self.g, self.o = nn.Linear(D, H) if gated else None, nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> Any:
        scores = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        h = scores @ self.v(x)
        return self.o(h if self.g is None else h * torch.sigmoid(self.g(x)))


class SDPA(Attention):
    def forward(self, x: torch.Tensor) -> Any:
        h = F.scaled_dot_product_attention(self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None])[:, 0]
        return self.o(h if self.g is None else h * F.silu(self.g(x)))


class LinearAttention(Attention):
    """Gated linear attention without a product of two computed matrices: a running sum over tokens."""

    def forward(self, x: torch.Tensor) -> Any:
        state = torch.cumsum(torch.sigmoid(self.k(x)) * self.v(x), 1)
        return self.o(F.silu(self.q(x)) * state)


class ShiftedGate(Attention):
    """Elementwise to the eye, but a token reads its neighbour."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.o(F.silu(self.q(x)) * self.v(x).roll(1, 1))


class LowRank(nn.Module):
    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(D, H), nn.Linear(H, D), scale
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.drop(self.a(x))
        return self.b(h if self.scale is None else h * self.scale + 1.0)


class TwoBranches(nn.Module):
    """A linear of a sum of two linears: affine, whatever operations are written."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> Any:
        return self.o(2.0 * self.a(x) - self.b(x) / 3.0)


class SqueezeExcite(nn.Module):
    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(D, H), nn.Linear(H, D), last or nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> Any:
        return x * self.last(self.b(F.relu(self.a(x.mean(1, keepdim=True)))))


class TokenwiseExcite(SqueezeExcite):
    """An excitation of each token by itself: token in, same token out, but its output is a gate."""

    def forward(self, x: torch.Tensor) -> Any:
        return x * self.last(self.b(F.relu(self.a(x))))


class Head(nn.Module):
    def __init__(self, classes: int, pool: bool) -> None:
        super().__init__()
        self.a, self.b, self.pool = nn.Linear(D, H), nn.Linear(H, classes), pool

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(F.gelu(self.a(x[:, 0] if self.pool else x)))


class Mixer(nn.Module):
    """MLP-Mixer's token mixing: the linears run over tokens."""

    def __init__(self, tokens: int = 5) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(D), nn.Linear(tokens, H), nn.Linear(H, tokens)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.b(F.gelu(self.a(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class Deep(nn.Module):
    """Three linears: the first pair feeds an activation, so only the second pair has an FFN's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)


class NormInside(Plain):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(self.norm(F.gelu(self.up(x))))


class StatisticInside(Plain):
    """BitNet's norm, written out."""

    def forward(self, x: torch.Tensor) -> Any:
        h = F.relu(self.up(x)).square()
        return self.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))


class TopKInside(Plain):
    def forward(self, x: torch.Tensor) -> Any:
        h = F.relu(self.up(x))
        return self.down(torch.where(h >= h.topk(4, -1).values[..., -1:], h, torch.zeros_like(h)))


class CrossGated(nn.Module):
    """The gate reads another tensor than the up projection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o, self.norm = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D), nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> Any:
        return self.o(F.silu(self.a(x)) * self.b(self.norm(x)))


class Merge(nn.Module):
    """A score of two things, as TGN's link predictor makes one."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.a, self.b, self.o, self.norm = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, width), nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> Any:
        return self.o(F.relu(self.a(x) + self.b(self.norm(x))))


class Watched(Plain):
    """Somebody else reads the hidden units: their order is not free."""

    def forward(self, x: torch.Tensor) -> Any:
        h = F.relu(self.up(x))
        return self.down(h) + h[..., :D]


class Reversed(Plain):
    def forward(self, x: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(x)).flip(-1))


class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(D, H)), nn.Parameter(torch.randn(H, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ self.w1) @ self.w2


class Experts(nn.Module):
    """Three experts in 3-D weights, mixed by a router of the model's own."""

    def __init__(self, gated: bool = True) -> None:
        super().__init__()
        self.gate, self.gated = nn.Linear(D, 3), gated
        self.w1, self.w2 = nn.Parameter(torch.randn(3, D, H * (1 + gated))), nn.Parameter(torch.randn(3, H, D))

    def forward(self, x: torch.Tensor) -> Any:
        if self.gated:
            a, b = (x[:, None] @ self.w1).chunk(2, -1)
            h = F.silu(a) * b
        else:
            h = F.gelu(torch.einsum("btd,edf->betf", x, self.w1))
        return ((h @ self.w2) * self.gate(x).softmax(-1).movedim(-1, 1)[..., None]).sum(1)
