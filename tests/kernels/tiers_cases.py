"""Random arguments of `ltepass::tiered_ffn`, and their judge in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ltepass.kernels import planes, proxy_reference, tiers, tiers_reference
from ltepass.kernels.packed_planes import pack
from ltepass.kernels.proxy_codes import Codes
from tests.kernels import proxy_cases
from tests.kernels.proxy_cases import Recipe

SHARES = ((0.3, 0.7), (0.1, 1.0), (0.0, 0.5), (1.0, 1.0), (0.3, 0.3))  # of neurons: the best, and those that are kept
recipes = proxy_cases.recipes.map(lambda recipe: replace(recipe, group_size=1, blocks=True))
shares = st.sampled_from(SHARES)


def make(r: Recipe, best: float = 0.3, kept: float = 0.7) -> tuple[Any, ...]:
    """Arguments of the op: planes of random weights, thresholds that leave about these shares."""
    x, codes, multipliers, scales, *others, activation = proxy_cases.make(r)
    gen = torch.Generator().manual_seed(r.seed + 2)
    high = Codes(codes, multipliers, scales)
    weights = planes.dequantise(high, r.d_model)
    _, low = planes.split(weights + 0.02 * torch.randn(weights.shape, generator=gen), high)
    down, low_down = planes.split(torch.randn(1, r.d_ff, r.d_model, generator=gen) / r.d_ff**0.5)
    low = Codes(*(torch.cat((a, b)) for a, b in zip(low, low_down, strict=True) if a is not None and b is not None))
    logits = proxy_cases.defined((x, *high, *others, activation))
    cuts = [cut_of(logits, share) for share in (best, kept)]
    bias = torch.randn(r.d_model, generator=gen).to(r.dtype) if r.bias else None
    return (x, *high, *others, *cuts, *down, *low, bias, activation)


def packed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same of `ltepass::packed_tiered_ffn`."""
    c = tiers.call(args)
    router = c.deciding
    rest = (router.proxy.biases, router.proxy.sizes, router.weight, router.bias, c.threshold, c.floor)
    return (c.x, *pack(c.planes), *rest, c.down_bias, router.activation)


def cut_of(logits: Tensor, share: float) -> Tensor:
    """[]: what this share of the finite logits lies above."""
    seen = logits[logits.isfinite()].sort().values
    above = round(share * len(seen))
    if above == len(seen):
        return torch.tensor(-torch.inf)
    return torch.tensor(torch.inf) if share == 0.0 else seen[len(seen) - 1 - above].clone()


def judge(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """fp64: the definition, and the size of the terms that an output is the sum of."""
    c = tiers.checked(args)
    logits = proxy_reference.scores(*c.deciding)
    given = (c.x, logits, c.threshold, c.floor, c.planes, c.deciding.activation)
    y = tiers_reference.tiered_ffn(*given, wide=torch.float64)
    high, down, low = (planes.dequantise(codes, c.x.shape[-1], torch.float64) for codes in c.planes[:3])
    seen = tiers_reference.rounded(c.x, torch.float64)
    # A hidden unit of the high planes, and what it may be with the low ones.
    units = [torch.stack([seen @ rows.mT for rows in some]) for some in (high, high + low[:-1])]
    if c.planes.biases is not None:
        units = [unit + c.planes.biases.double()[:, None] for unit in units]
    z = 1 + units[0].abs().maximum(units[1].abs())
    z[0] **= 2 if c.deciding.activation == "relu2" else 1  # as it grows
    terms = z.prod(0) @ (down[0].abs() + low[-1].abs())
    return (y, terms) if c.down_bias is None else (y + c.down_bias.double(), terms + c.down_bias.double().abs())


def assert_values(args: tuple[Any, ...], y: Tensor) -> None:
    """fp32: within 1e-6 of the size of the terms; 16 bits: and one rounding of y. A decision that flips is far off."""
    wanted, terms = judge(args)
    assert y.shape == wanted.shape
    assert y.dtype == args[0].dtype
    assert torch.equal(y.isfinite().all(-1), wanted.to(y.dtype).isfinite().all(-1))
    finite = y.isfinite().all(-1)
    rounding = 0 if y.dtype in (torch.float32, torch.float64) else torch.finfo(y.dtype).eps / 2
    allowed = 1e-6 * terms + rounding * wanted.abs() + torch.finfo(torch.float16).tiny * (y.dtype == torch.float16)
    assert ((y.double() - wanted).abs() <= allowed + 1e-37)[finite].all()
