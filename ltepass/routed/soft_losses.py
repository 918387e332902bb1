"""The paper's two auxiliary losses (section 4.3), kept per token so that a trainer can mask and weigh them exactly.

Beside them, not in the paper: a term by which neighbouring tokens share experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 1 / (G - tau)^2 is infinite at G = tau: |G - tau| is clamped from below at this value, so one expert adds at most
# 1 / 0.05^2 = 400 and gets no separability gradient inside the band (the task and efficiency losses move it out).
SEPARABILITY_CLAMP = 0.05


def per_token_losses(logits: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """logits: [..., n_experts] -> (efficiency, separability), each [...] fp32, means over experts.

    efficiency = mean_i G_i^2; separability = mean_i 1 / max(|G_i - tau|, clamp)^2.
    """
    scores = torch.sigmoid(logits)
    distance = (scores - tau).abs().clamp_min(SEPARABILITY_CLAMP)
    return scores.square().mean(-1), distance.pow(-2).mean(-1)


def union_per_token(logits: Tensor) -> Tensor:
    """logits: [..., T, n_experts] -> [..., T] fp32: mean_i (G_t,i - G_t-1,i)^2, 0 at the first token.

    What a batched kernel reads is the union over neighbouring tokens: at a given sparsity it is smallest where they
    agree.
    """
    scores = torch.sigmoid(logits)
    change = scores.new_zeros(scores.shape[:-1])
    if scores.dim() > 1:
        change[..., 1:] = (scores[..., 1:, :] - scores[..., :-1, :]).square().mean(-1)
    return change
