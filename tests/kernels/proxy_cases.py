"""Random arguments of `ltepass::proxy_scores` and `ltepass::routed_proxy_ffn`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ltepass.kernels import proxy, proxy_codes, proxy_reference, reference


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """fault: what one element of the last token is; nothing where it is None."""

    T: int = 5
    d_model: int = 60
    n_experts: int = 12
    group_size: int = 1
    dtype: torch.dtype = torch.float32
    gated: bool = True
    bias: bool = True
    blocks: bool = True
    activation: str = "silu"
    size: float = 1.0
    fault: float | None = None
    seed: int = 0

    @property
    def d_ff(self) -> int:
        return self.n_experts * self.group_size


recipes = st.builds(
    Recipe,
    T=st.sampled_from((0, 1, 2, 7, 40)),
    d_model=st.sampled_from((1, 15, 16, 32, 33, 60, 127, 128, 200)),
    n_experts=st.sampled_from((1, 3, 17, 40)),
    group_size=st.sampled_from((1, 2, 8, 17)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    gated=st.booleans(),
    bias=st.booleans(),
    blocks=st.booleans(),
    activation=st.sampled_from(tuple(reference.ACTIVATIONS)),
    size=st.sampled_from((0.0, 1e-38, 1e-3, 1.0, 30.0)),
    fault=st.sampled_from((None, None, torch.nan, torch.inf)),
    seed=st.integers(0, 1000),
)


def make(r: Recipe) -> tuple[Any, ...]:
    """x, codes, multipliers, scales, biases, sizes, weight, bias, activation."""
    gen = torch.Generator().manual_seed(r.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    k = 2 if r.gated else 1
    weights = random(k, r.d_ff, r.d_model) / r.d_model**0.5
    x = r.size * random(r.T, r.d_model)
    if r.fault is not None and r.T:
        x[-1, r.d_model // 2] = r.fault
    constants = (*proxy_codes.quantise(weights, blocks=r.blocks), random(k, r.d_ff) if r.bias else None)
    learned = (1 + 0.1 * random(r.n_experts), 0.3 * random(1)[0])
    return (x.to(r.dtype), *constants, random(r.d_ff).abs(), *learned, r.activation)


def defined(args: tuple[Any, ...]) -> Tensor:
    """The scores by their definition, of the op's arguments."""
    return proxy_reference.scores(*proxy.call(args))


def with_ffn(r: Recipe) -> tuple[Any, ...]:
    """The arguments of the whole FFN, of the weights that the codes stand for, with a threshold in the middle."""
    args: Any = make(r)
    _, codes, multipliers, scales, biases, *_rest, activation = args
    gen = torch.Generator().manual_seed(r.seed + 1)
    rows = (proxy_codes.integers(codes, multipliers) * scales[..., None])[..., : r.d_model].to(r.dtype)
    added: Any = [None] * len(rows) if biases is None else biases.to(r.dtype)
    gate = (rows[0], added[0]) if r.gated else (None, None)
    down = (torch.randn(r.d_model, r.d_ff, generator=gen) / r.d_ff**0.5).to(r.dtype)
    scores = defined(args)
    seen = scores[scores.isfinite()]
    threshold = seen.median() if seen.numel() else torch.tensor(0.0)
    router = (*args[:-1], threshold)
    return (*router, rows[-1], added[-1], *gate, down, None, activation)
