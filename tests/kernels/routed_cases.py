"""Random arguments of `ltepass::routed_ffn` whose decisions no rounding can flip, and the judge in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels import reference

ARGUMENTS = (
    "x",
    "router_weight",
    "router_bias",
    "threshold",
    "up",
    "up_bias",
    "gate",
    "gate_bias",
    "down",
    "down_bias",
)
LAYOUTS = ("linear", "neuron_rows", "fused", "conv1d", "scattered")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    T: int = 5
    d_model: int = 60
    n_experts: int = 10
    group_size: int = 8
    d_out: int = 60
    dtype: torch.dtype = torch.float32
    gated: bool = True
    bias: bool = True
    mask: str = "random"
    layout: str = "linear"
    activation: str = "silu"
    contiguous: bool = True
    seed: int = 0


def make(r: Recipe) -> tuple[Any, ...]:
    """Arguments in schema order. Every logit is at least 1 away from the threshold: each router row reads one element
    of x, and no element of x is small."""
    gen = torch.Generator().manual_seed(r.seed)
    d_ff = r.n_experts * r.group_size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    def weight(rows: int, cols: int) -> Tensor:
        return (random(rows, cols) / math.sqrt(cols)).to(r.dtype)

    def bias(n: int) -> Tensor | None:
        return random(n).to(r.dtype) if r.bias else None

    x = random(r.T, r.d_model)
    x = (x + torch.sign(x) * 0.5).to(r.dtype)
    router = torch.zeros(r.n_experts, r.d_model)
    router[torch.arange(r.n_experts), torch.arange(r.n_experts) % r.d_model] = 4.0
    router_bias = random(r.n_experts).clamp(-1, 1) / 2 if r.bias else None
    threshold = torch.tensor({"none": 1e4, "all": -1e4}.get(r.mask, 0.25))
    if r.mask == "one":
        router_bias = torch.full((r.n_experts,), -1e4)
        router_bias[r.n_experts // 2] = 1e4
    up, gate = weight(d_ff, r.d_model), weight(d_ff, r.d_model)
    up, gate, down = lay_out(r.layout, up, gate, weight(r.d_out, d_ff))
    gate_bias = bias(d_ff)
    if not r.contiguous:
        x = torch.stack([x, x], -1)[..., 0]
    gates = (gate, gate_bias) if r.gated else (None, None)
    return (x, router, router_bias, threshold, up, bias(d_ff), *gates, down, bias(r.d_out), r.activation)


def lay_out(layout: str, up: Tensor, gate: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values as views of other buffers."""

    def turned(w: Tensor) -> Tensor:
        return w.t().contiguous().t()

    def scattered(w: Tensor) -> Tensor:
        return torch.repeat_interleave(torch.repeat_interleave(w, 2, 0), 2, 1)[::2, ::2]

    if layout == "neuron_rows":
        return up, gate, turned(down)
    if layout == "fused":  # gate_up of Phi-3 and GLM
        both = torch.cat([gate, up])
        return both[up.shape[0] :], both[: up.shape[0]], down
    if layout == "conv1d":  # GPT-2's weight.t()
        return turned(up), turned(gate), turned(down)
    if layout == "scattered":
        return scattered(up), scattered(gate), scattered(down)
    return up, gate, down


def doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


def with_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Every tensor a leaf that wants a gradient, strides kept."""
    out = []
    for a in args:
        if isinstance(a, Tensor):
            a = a.detach().requires_grad_(True)
        out.append(a)
    return tuple(out)


def hidden(args: tuple[Any, ...]) -> Tensor:
    """[..., d_ff]: every hidden unit, 0 for those of inactive experts, whatever is cut."""
    call, down = list(args[:11]), args[8]
    call[8:10] = torch.eye(down.shape[1], dtype=down.dtype, device=down.device), None
    return reference.routed_ffn(*call)


def size_of_terms(args: tuple[Any, ...]) -> Tensor:
    """[]: the largest sum |h_j down_ij| + |bias_i| of an output: what rounding is relative to, whatever cancels."""
    named = dict(zip(ARGUMENTS, args, strict=False))
    down, bias = named["down"], named["down_bias"]
    terms: Tensor = hidden(args).abs() @ down.abs().T + (0 if bias is None else bias.abs())
    return terms.max().clamp_min(1e-30)


def hidden_rounding(args: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """[]: the standard deviation, at an output where it is largest, that rounding each h_j to `dtype` brings."""
    down = dict(zip(ARGUMENTS, args, strict=False))["down"]
    spread: Tensor = (hidden(args).square() @ down.square().T).sqrt()
    return spread.max() * torch.finfo(dtype).eps / 12**0.5


def carried_rounding(args: tuple[Any, ...]) -> Tensor:
    """[]: four standard deviations, at an output where they are largest, of what fp32 sums of up and gate bring. Near a
    zero of a pre-activation, |h| says nothing of it: relu2 of a sum that cancels is off by any part of itself."""
    x, up, up_bias, gate, gate_bias, down, _, activation = (args[0], *args[4:11])
    act = reference.ACTIVATIONS[activation]
    u, u_off = F.linear(x, up, up_bias), 4 * sum_rounding(x, up, up_bias)
    a, a_off = (u, u_off) if gate is None else (F.linear(x, gate, gate_bias), 4 * sum_rounding(x, gate, gate_bias))
    off = (act(a + a_off) - act(a)).abs().maximum((act(a - a_off) - act(a)).abs())
    square = off.square() if gate is None else (off * (u.abs() + u_off)).square() + (act(a) * u_off).square()
    active = reference.mask(*args[:4]).to(x.dtype)
    square = square * active.repeat_interleave(square.shape[-1] // active.shape[-1], -1)
    spread: Tensor = (square @ down.square().T).sqrt()
    return spread.max()


def sum_rounding(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., rows]: the standard deviation of sums of n products t in a row, in fp32. A product and a partial sum are
    each rounded by up to u = 2^-24 of themselves, u / 3^0.5 in the mean; n partial sums of terms of random signs have
    the squares (n + 1) / 2 |t|^2 in all. Sums by lanes, as kernels make them, are off by less."""
    size = F.linear(x.square(), weight.square(), None if bias is None else bias.square()).sqrt()
    rounding: Tensor = size * torch.finfo(torch.float32).eps / 2 * ((x.shape[-1] + 3) / 6) ** 0.5
    return rounding


def assert_values(y: Tensor, args: tuple[Any, ...], factor: float = 1.5) -> None:
    """fp32: within 1e-6 of the size of the terms and what pre-activations carry, in fp64. bf16, fp16: not further from
    fp64 than `factor` times PyTorch's own low-precision result, plus one rounding of the output. That result is lucky
    at times, where an output or two are not 0: it counts as no better than exact hidden units that are rounded once."""
    exact = reference.routed_ffn(*doubled(args))
    if exact.numel() == 0:
        return
    error = (y.double() - exact).abs().max()
    if y.dtype == torch.float32:
        assert error < 1e-6 * size_of_terms(doubled(args)) + carried_rounding(doubled(args))
        return
    scale = exact.abs().max().clamp_min(1e-30)
    stock = (reference.routed_ffn(*args).double() - exact).abs().max().maximum(hidden_rounding(doubled(args), y.dtype))
    assert error / scale <= factor * stock / scale + torch.finfo(y.dtype).eps / 2
