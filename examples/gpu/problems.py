"""FFN calls whose experts are active in exactly a stated share, at random, as the speed table asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Masks = Literal["independent", "shared"]
LOGIT = 4.0  # an active expert's logit; an inactive one's is its negative, the threshold 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An FFN: sizes of its three weights, neurons an expert, tokens of a call."""

    name: str
    d_model: int
    d_ff: int
    group_size: int = 32
    tokens: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def n_experts(self) -> int:
        return self.d_ff // self.group_size

    @property
    def dense_bytes(self) -> int:
        return 3 * self.d_model * self.d_ff * self.dtype.itemsize

    def routed_bytes(self, active: float) -> float:
        """Weights that a call with this share of experts must read, and the fp32 router."""
        return active * self.dense_bytes + 4 * self.n_experts * self.d_model


@dataclass(frozen=True)
class Problem:
    """The op's arguments and the decision they lead to, bool [T, n_experts]."""

    args: tuple[Any, ...]
    mask: Tensor

    @property
    def union(self) -> float:
        """Share of experts that some token wants."""
        return float(self.mask.any(0).float().mean())


def make(shape: Shape, active: float, masks: Masks, device: str, seed: int = 0, by_neuron: bool = False) -> Problem:
    """Random weights; the router is the least-squares solution that gives each token the experts drawn for it."""
    g = torch.Generator(device).manual_seed(seed)
    d, f, dtype = shape.d_model, shape.d_ff, shape.dtype
    assert shape.tokens <= d, f"{shape.tokens} tokens of {d} numbers: no router gives each of them its own experts"

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=g, device=device, dtype=dtype).mul_(columns**-0.5)

    x = torch.randn(shape.tokens, d, generator=g, device=device, dtype=dtype)
    mask = _draw(shape, active, masks, g, device)
    up, gate = weight(f, d), weight(f, d)
    down = weight(f, d).mul_((d / f) ** 0.5).t() if by_neuron else weight(d, f)
    threshold = torch.zeros((), device=device)
    return Problem((x, _router(x, mask), None, threshold, up, None, gate, None, down, None, "silu"), mask)


def _draw(shape: Shape, active: float, masks: Masks, g: torch.Generator, device: str) -> Tensor:
    rows = shape.tokens if masks == "independent" else 1
    order = torch.rand(rows, shape.n_experts, generator=g, device=device).argsort(-1).argsort(-1)
    return (order < round(active * shape.n_experts)).expand(shape.tokens, -1)


def _router(x: Tensor, mask: Tensor) -> Tensor:
    """[n_experts, d_model] fp32 with x . weight = +-LOGIT exactly where wanted: X^T (X X^T)^-1 S, in float64."""
    wide = x.double()
    signs = torch.where(mask, LOGIT, -LOGIT).double()
    solved: Tensor = torch.linalg.solve(wide @ wide.t(), signs)
    return (wide.t() @ solved).t().float().contiguous()
