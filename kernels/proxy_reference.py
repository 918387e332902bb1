"""What the scores of a proxy router are, in plain PyTorch, bit by bit: every kernel decides as these lines do.

A proxy knows the FFN itself in 4 bits: it computes hidden units from codes of gate and up, and scores each neuron by
what it would add to the output. Codes are integers in [-7, 7], stored 8 higher, two a byte as `pack_int4` lays them; a
row has an fp32 scale, and with scales in blocks each 32 inputs of it have an integer multiplier:

    w_ji = code_ji * multiplier_j,block(i) * scale_j

so that the sums of a whole row are integers, exact in any order. The order of operations, each one rounded by itself
(fp32, to nearest even; nothing is contracted to an FMA), is the definition:

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

from ltepass.kernels.backward import ACTIVATION_GRADS
from ltepass.kernels.linear_reference import BLOCK, pack_int4, to_int8, unpack_int4
from ltepass.kernels.reference import ACTIVATIONS

LARGEST = 7  # of a code
ZERO = 8  # how code 0 is stored
MULTIPLIERS = 63  # the largest, where d_model allows it: a sum stays below 2^31
CLIPS = (1.0, 0.92, 0.84, 0.76)  # of a block's largest weight: what rounds best is taken; 11 of them gain 1 % of error


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


class Codes(NamedTuple):
    """Of k = 1 (up) or 2 (gate, up) linears of f neurons.

    codes: uint8 [k, f, 16 blocks]; multipliers: uint8 [k, f, blocks] or None; scales: fp32 [k, f].
    """

    codes: Tensor
    multipliers: Tensor | None
    scales: Tensor


class Proxy(NamedTuple):
    """What a router knows of an FFN of f neurons, all constant; the first three as in `Codes`.

    biases: fp32 [k, f], of the linears, or None where none has one; sizes: fp32 [f], what each neuron writes with.
    """

    codes: Tensor
    multipliers: Tensor | None
    scales: Tensor
    biases: Tensor | None
    sizes: Tensor


def blocks_of(d_model: int) -> int:
    return -(-d_model // BLOCK)


def largest_multiplier(d_model: int) -> int:
    return min(MULTIPLIERS, (2**31 - 1) // (127 * LARGEST * max(d_model, 1)))


def quantise(weights: Tensor, *, blocks: bool) -> Codes:
    """weights: [k, f, d_model] -> their codes, zeros behind the last input; blocks: a multiplier for each 32 inputs."""
    d_model = weights.shape[-1]
    rows = in_blocks(weights.float())
    if not blocks:
        codes, _, units = fit_codes(rows.flatten(-2), None, 1)
        return Codes(pack(codes), None, units)
    most = largest_multiplier(d_model)
    step = steps_of(rows, most)
    codes, multipliers, _ = fit_codes(rows, step[..., None], most)
    return Codes(pack(codes.flatten(-2)), multipliers.to(torch.uint8), step)


def in_blocks(rows: Tensor) -> Tensor:
    """[..., d] -> [..., blocks, 32], zeros behind the last."""
    blocks: Tensor = F.pad(rows, (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    return blocks


def steps_of(rows: Tensor, most: int) -> Tensor:
    """rows: [..., blocks, 32] -> [...]: a row's largest weight is the largest code times the largest multiplier."""
    step = rows.abs().amax((-1, -2)) / LARGEST / most
    return step.clamp_min(torch.finfo(torch.float32).tiny)


def fit_codes(rows: Tensor, step: Tensor | None, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows: [..., n] that share a unit each -> codes [..., n], multipliers [...] and units [...], the best of CLIPS.

    A unit is a multiplier in [1, most] times step [...]; without a step it is any number, and the multiplier 1.
    """
    wanted = rows.abs().amax(-1) / LARGEST
    best = torch.full_like(wanted, torch.inf)
    codes, multipliers, units = torch.zeros_like(rows), torch.ones_like(wanted), wanted
    for clip in CLIPS:
        if step is None:
            factors, unit = torch.ones_like(wanted), clip * wanted.clamp_min(torch.finfo(torch.float32).tiny)
        else:
            factors = (clip * wanted / step).round().clamp(1, most)
            unit = factors * step
        tried = (rows / unit[..., None]).round().clamp(-LARGEST, LARGEST)
        error = (tried * unit[..., None] - rows).square().sum(-1)
        better = error < best
        best, codes = best.where(~better, error), codes.where(~better[..., None], tried)
        multipliers, units = multipliers.where(~better, factors), units.where(~better, unit)
    return codes, multipliers, units


def pack(codes: Tensor) -> Tensor:
    """codes: [..., 32 blocks] integers in [-7, 7], of any dtype -> uint8 [..., 16 blocks]."""
    return pack_int4((codes + ZERO).to(torch.uint8))


def integers(codes: Tensor, multipliers: Tensor | None) -> Tensor:
    """codes times multipliers: [k, f, 32 blocks] fp64, which holds the sums exactly."""
    weights = unpack_int4(codes).double() - ZERO
    if multipliers is None:
        return weights
    scaled: Tensor = weights.unflatten(-1, (-1, BLOCK)) * multipliers.double()[..., None]
    return scaled.flatten(-2)


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
    """Of (x, weight, bias), where wanted; grad: [..., n_experts]. The rounding of x and of the score is passed by."""
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
