"""What an FFN with tiers of bits computes, in plain PyTorch: every kernel is judged by these lines.

Its weights are two planes of 4 bits (`planes.py`), and a score for each neuron (`proxy_reference.scores`, from the
high plane of gate and up) says how much of it is read:

    best    score > threshold           z = (high + low) x', in both of gate and up;  y += h (high + low) of down
    kept    floor < score <= threshold  z = high x';                                  y += h high of down
    rest    score <= floor              y += 0

with h = act(z_gate) z_up, or act(z_up) without a gate. x' is x in the int8 codes that the score is taken of: what the
score sums up is then the hidden unit itself, and a neuron that is kept reads no more of gate and up than one that is
not. Against x as it is, perplexity is x0.999 to 1.002 of SmolLM2-135M off its grid, and x1.010 (1.004 .. 1.016) of the
model as it comes, on the text of its codes (p .05, q 1, rounded codes, 4,096 tokens a text).
A decision has bits that no kernel may change; a value has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.planes import dequantise
from ltepass.kernels.proxy_codes import Codes
from ltepass.kernels.proxy_reference import quantise_token
from ltepass.kernels.reference import ACTIVATIONS


class Planes(NamedTuple):
    """Of an FFN of f neurons and k = 1 (up) or 2 (gate, up) linears before its down projection.

    high: of gate and up [k, f, ...]; down: high codes of down's columns [1, f, ...]; low: of all [k + 1, f, ...];
    biases: fp32 [k, f], or None where no linear has one.
    """

    high: Codes
    down: Codes
    low: Codes
    biases: Tensor | None


def planes_of(tensors: Sequence[Tensor], biases: Tensor | None = None) -> Planes:
    """tensors: codes, multipliers and scales of each plane."""
    high, down, low = (Codes(*tensors[i : i + 3]) for i in (0, 3, 6))
    return Planes(high, down, low, biases)


def tiered_ffn(
    x: Tensor,
    logits: Tensor,
    threshold: Tensor,
    floor: Tensor,
    planes: Planes,
    activation: str,
    *,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """x: [..., d_model] any float dtype -> [..., d_model] of x's, or fp64 where sums are in `wide` fp64, the judge;
    down's bias is the caller's.

    logits: fp32 [..., f]; threshold, floor: fp32 []. Gradients reach x as if nothing were decided or rounded; codes are
    constants.
    """
    kept = logits > torch.minimum(threshold, floor)
    return shared_ffn(x, logits > threshold, kept, planes, activation, wide=wide)


def shared_ffn(
    x: Tensor, best: Tensor, kept: Tensor, planes: Planes, activation: str, *, wide: torch.dtype = torch.float32
) -> Tensor:
    """As `tiered_ffn`, of what was decided: best, kept: [..., f], bool, or shares of both planes and of down's high one
    from 0 to 1, as a soft gate has them.
    """
    high, down, low = (dequantise(codes, x.shape[-1], wide) for codes in planes[:3])
    *rest, down_rest = low
    seen = rounded(x, wide)
    z = [
        F.linear(seen, weight) + _share_of(F.linear(seen, left), best) for weight, left in zip(high, rest, strict=True)
    ]
    if planes.biases is not None:
        z = [unit + bias for unit, bias in zip(z, planes.biases, strict=True)]
    hidden = ACTIVATIONS[activation](z[0])
    h = hidden * z[1] if len(z) == 2 else hidden
    y: Tensor = _share_of(h, kept) @ down[0] + _share_of(h, best) @ down_rest
    return y if wide == torch.float64 else y.to(x.dtype)


def _share_of(values: Tensor, share: Tensor) -> Tensor:
    """A decision also keeps what is not finite away."""
    return values.masked_fill(~share, 0.0) if share.dtype == torch.bool else values * share.to(values.dtype)


def rounded(x: Tensor, wide: torch.dtype = torch.float32) -> Tensor:
    """x: [..., d_model] -> what its codes stand for, fp32 or fp64; the gradient is x's own."""
    codes, scale = quantise_token(x.detach())
    return codes * scale[..., None].to(wide) + (x.float() - x.detach().float())
