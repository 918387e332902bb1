"""A router's table: the thresholds that leave 0 %, 1 %, ... 100 % of its logits inactive, and values between them."""

from __future__ import annotations

import torch
from torch import Tensor

N_QUANTILES = 101
TABLE_TOKENS = 8192  # of which a site's table is made: a share is then off by half a point over sqrt(n_experts)
TABLE_LOGITS = 2**21  # at most, where experts are many: so few tokens are as good then
LEAST_TOKENS = 256  # tokens differ too


def table_tokens(n_experts: int) -> int:
    """How many of the tokens make a table."""
    return min(TABLE_TOKENS, max(LEAST_TOKENS, TABLE_LOGITS // n_experts))


def table_of(logits: Tensor) -> Tensor:
    """[101]: the thresholds that leave 0 %, 1 %, ... 100 % of these logits, of any shape, at or below them."""
    return quantiles(logits.flatten(), torch.linspace(0.0, 1.0, N_QUANTILES, dtype=torch.float32, device=logits.device))


def interpolate(quantiles: Tensor, sparsity: float) -> Tensor:
    """A table's value at a sparsity, linear between its points; 0 lets every expert pass. quantiles: [101]."""
    if sparsity == 0.0:
        # An op where this is traced: a package finds no constant without a name.
        return torch.full_like(quantiles[0], -torch.inf)
    at = sparsity * (N_QUANTILES - 1)
    low = int(at)
    return torch.lerp(quantiles[low], quantiles[min(low + 1, N_QUANTILES - 1)], at - low)


def quantiles(values: Tensor, grid: Tensor) -> Tensor:
    """Quantiles of a long vector: torch.quantile stops at 2^24 values."""
    ordered = values.sort().values
    at = grid.double() * (len(ordered) - 1)  # fp32 cannot count that far either
    low = at.floor().long()
    return torch.lerp(ordered[low], ordered[(low + 1).clamp_max(len(ordered) - 1)], (at - low).to(ordered))
