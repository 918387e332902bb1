"""What an FFN with tiers of bits computes, in plain PyTorch: every kernel is judged by these lines.

Its weights are two planes of 4 bits (`planes.py`), and a score for each neuron (`proxy_reference.scores`, from the
high plane of gate and up) says how much of it is read:

    best    score > threshold           z = (high + low) x, in both of gate and up;  y += h (high + low) of down
    kept    floor < score <= threshold  z = high x;                                  y += h high of down
    rest    score <= floor              y += 0

with h = act(z_gate) z_up, or act(z_up) without a gate. A decision has bits that no kernel may change; a value has not.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.planes import dequantise
from ltepass.kernels.proxy_codes import Codes
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


def tiered_ffn(x: Tensor, logits: Tensor, threshold: Tensor, floor: Tensor, planes: Planes, activation: str) -> Tensor:
    """x: [..., d_model] any float dtype -> [..., d_model] of x's; down's bias is the caller's. Sums in fp32.

    logits: fp32 [..., f]; threshold, floor: fp32 []. Gradients reach x as if nothing were decided; codes are constants.
    """
    d_model, wide = x.shape[-1], x.float()
    best = logits > threshold
    kept = best | (logits > floor)
    *rest, down_rest = dequantise(planes.low, d_model)
    z = [
        F.linear(wide, weight) + F.linear(wide, left).masked_fill(~best, 0.0)
        for weight, left in zip(dequantise(planes.high, d_model), rest, strict=True)
    ]
    if planes.biases is not None:
        z = [unit + bias for unit, bias in zip(z, planes.biases, strict=True)]
    hidden = ACTIVATIONS[activation](z[0])
    h = hidden * z[1] if len(z) == 2 else hidden
    y: Tensor = h.masked_fill(~kept, 0.0) @ dequantise(planes.down, d_model)[0] + h.masked_fill(~best, 0.0) @ down_rest
    return y.to(x.dtype)
