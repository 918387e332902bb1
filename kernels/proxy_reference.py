"""What the scores of a proxy router are, in plain PyTorch, bit by bit: every kernel decides as these lines do.

A proxy knows the FFN itself in 4 bits: it computes hidden units from codes of gate and up, and scores each neuron by
what it would add to the output. w_ji = code_ji * multiplier_j,block(i) * scale_j (`proxy_codes.py`), so that sums of a
whole row are integers. The order of operations, each one rounded by itself (fp32, to nearest even; nothing is
contracted to an FMA), is the definition:

    x       m = max |x_i|, s = m / 127, r = 1 / s, c_i = round_half_even(x_i * r), in [-127, 127]; all 0 where s is no
            normal number: x is 0 then, or holds a NaN or Inf, which stays in s
    unit    z_j = (float(sum_i code_ji multiplier c_i) * scale_j) * s, then + bias_j where the linear has one
    act     relu, relu2, identity as they are; z * cdf(z) for silu, gelu, gelu_tanh; z * cdf(1.702 * z) for quick_gelu
    cdf     c = clamp(z, -limit, limit), w = c * c, Horner's rule in w, times c, plus 0.5
    neuron  a_j = |act(g_j) * u_j| * size_j, or |act(u_j)| * size_j without a gate
    expert  a_j alone, or sqrt(a_0 * a_0 + a_1 * a_1 + ...), added one after the other: the size of what the expert adds
            where its neurons' columns do not point the same way, as calibration counts an expert's energy
    logit   (expert * weight) + bias; +Inf where that is NaN: a fault opens the gate, and is seen in the output

An expert is active where its logit is above the threshold. cdf is within 3e-3 / |z| of the true one, far below what 4
bits cost. Gradients flow as if nothing were rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.proxy_codes import integers
from ltepass.kernels.reference import ACTIVATIONS
from ltepass.kernels.routed_ffn_backward import ACTIVATION_GRADS
from ltepass.kernels.weight_formats import to_int8


class Polynomial(NamedTuple):
    """A cumulative distribution: 0.5 + c P(c^2), c clamped; coefficients from the lowest on."""

    limit: float
    coefficients: tuple[float, ...]


LOGISTIC = Polynomial(
    8.0,
    (0.24424246, -0.016765588, 9.9281338e-4, -3.8960653e-5, 9.5864896e-7, -1.4124211e-8, 1.1345992e-10, -3.812188e-13),
)
NORMAL = Polynomial(
    4.0, (0.39787027, -0.064554414, 0.0087636922, -8.1218776e-4, 4.7763918e-5, -1.5888288e-6, 2.258824e-8)
)
CDFS = {"silu": LOGISTIC, "quick_gelu": LOGISTIC, "gelu": NORMAL, "gelu_tanh": NORMAL}


class Proxy(NamedTuple):
    """What a router knows of an FFN of f neurons, all constant; the first three as in `Codes`.

    biases: fp32 [k, f], of the linears, or None where none has one; sizes: fp32 [f], what each neuron writes with.
    """

    codes: Tensor
    multipliers: Tensor | None
    scales: Tensor
    biases: Tensor | None
    sizes: Tensor


def quantise_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., d_model] -> codes int8 [..., d_model], scale fp32 [...]."""
    return to_int8(x.float())


def units(x: Tensor, proxy: Proxy) -> Tensor:
    """z: fp32 [k, ..., f]."""
    x_codes, x_scale = quantise_token(x)
    padded = F.pad(x_codes.double(), (0, proxy.codes.shape[-1] * 2 - x.shape[-1]))
    sums = [F.linear(padded, rows).float() for rows in integers(proxy.codes, proxy.multipliers)]
    z = torch.stack([s * scale for s, scale in zip(sums, proxy.scales, strict=True)]) * x_scale[..., None]
    return z if proxy.biases is None else z + proxy.biases.view(len(sums), *(1,) * (x.dim() - 1), -1)


def cdf(z: Tensor, polynomial: Polynomial) -> Tensor:
    c = z.clamp(-polynomial.limit, polynomial.limit)
    w = c * c
    *rest, last = polynomial.coefficients
    p = torch.full_like(w, last)
    for coefficient in reversed(rest):
        p = p * w
        p = p + coefficient
    p = p * c
    return p + 0.5


def act(z: Tensor, activation: str) -> Tensor:
    if activation in CDFS:
        return z * cdf(z * 1.702 if activation == "quick_gelu" else z, CDFS[activation])
    return ACTIVATIONS[activation](z)


def scores(x: Tensor, proxy: Proxy, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """x: [..., d_model] any float dtype -> logits [..., n_experts] fp32. The definition of `ltepass::proxy_scores`.

    weight: fp32 [n_experts]; bias: fp32 [].
    """
    first, *up = units(x, proxy)
    hidden = act(first, activation)
    neurons = (hidden * up[0] if up else hidden).abs() * proxy.sizes
    logits = _experts(neurons, len(weight)) * weight
    logits = logits + bias
    return logits.masked_fill(logits.isnan(), torch.inf)


def _experts(neurons: Tensor, n_experts: int) -> Tensor:
    parts: tuple[Tensor, ...] = neurons.unflatten(-1, (n_experts, -1)).unbind(-1)
    if len(parts) == 1:
        return parts[0]
    total = parts[0] * parts[0]
    for part in parts[1:]:
        square = part * part
        total = total + square
    return total.double().sqrt().float()  # fp32's own is a library's, and not always the nearest


def gradients(
    grad: Tensor,
    x: Tensor,
    proxy: Proxy,
    weight: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a proxy's scores by (x, weight, bias), where wanted, as if nothing were rounded; grad: [...,
    n_experts].
    """
    z = units(x, proxy)
    hidden = ACTIVATIONS[activation](z[0])
    t = hidden * z[1] if len(z) == 2 else hidden
    parts = (t.abs() * proxy.sizes).unflatten(-1, (len(weight), -1))
    experts = parts[..., 0] if parts.shape[-1] == 1 else parts.square().sum(-1).sqrt()
    d_weight = (grad * experts).flatten(0, -2).sum(0) if needs[1] else None
    d_bias = grad.sum() if needs[2] else None
    if not needs[0]:
        return None, d_weight, d_bias
    share = parts / experts.clamp_min(torch.finfo(torch.float32).tiny)[..., None]  # of each neuron; 1 where alone
    dt = ((grad * weight)[..., None] * share).flatten(-2) * proxy.sizes * t.sign()
    act_grad = ACTIVATION_GRADS[activation]
    dz = [act_grad(dt * z[1], z[0]), dt * hidden] if len(z) == 2 else [act_grad(dt, z[0])]
    rows = (integers(proxy.codes, proxy.multipliers) * proxy.scales[..., None]).float()[..., : x.shape[-1]]
    dx = torch.stack([d @ w for d, w in zip(dz, rows, strict=True)]).sum(0)
    return dx.to(x.dtype), d_weight, d_bias
