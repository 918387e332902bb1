"""FFN calls for the kernel tests: every shape odd on purpose, every decision far enough from the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltepass.kernels import reference
from tests.kernels import routed_cases

MARGIN = 1e-2  # logits keep this distance from the threshold, so that rounding x or the sum flips no decision


@dataclass(frozen=True, kw_only=True)
class Case:
    """layout: "rows" as nn.Linear keeps it; "fused" up and gate interleaved in one weight; "neuron" up, gate and down
    with one contiguous run per neuron of down and per input of up (Conv1D); cut: share of the active experts' hidden
    units that a cut leaves out, None for no cut."""

    T: int = 1
    d_model: int = 63
    group_size: int = 12
    n_experts: int = 7
    d_out: int = 41
    activation: str = "silu"
    gated: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "rows"
    density: float = 0.5
    margin: float = MARGIN
    cut: float | None = None
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.d_model}x{self.n_experts}x{self.group_size}-{self.d_out}"
        kind = f"{self.activation}-{'gated' if self.gated else 'plain'}-{self.layout}"
        return f"T{self.T}-{shape}-{dtype}-{kind}-p{self.density}"


def make(case: Case, device: str = "cpu") -> tuple[Any, ...]:
    """-> the op's arguments."""
    torch.manual_seed(case.seed)
    d, f, o, dtype = case.d_model, case.group_size * case.n_experts, case.d_out, case.dtype
    x = torch.randn(case.T, d).to(dtype)
    router_weight = torch.randn(case.n_experts, d)
    router_bias = torch.randn(case.n_experts) if case.bias else None
    threshold = _threshold(x, router_weight, router_bias, case)
    up, gate = _up_and_gate(case, f, d)
    down = (torch.randn(o, f) * f**-0.5).to(dtype)
    if case.layout == "neuron":
        down = down.t().contiguous().t()
    up_bias, gate_bias, down_bias = (torch.randn(n).to(dtype) if case.bias else None for n in (f, f, o))
    if gate is None:
        gate_bias = None
    tensors = (x, router_weight, router_bias, threshold, up, up_bias, gate, gate_bias, down, down_bias)
    # a transposed view stays one on its way to a device
    args = (*(None if t is None else t.to(device) for t in tensors), case.activation)
    return args if case.cut is None else (*args, _cut(hidden(args).abs(), case.cut).to(device))


def hidden(args: tuple[Any, ...]) -> Tensor:
    """Hidden units in float64, [T, d_ff], 0 for those of inactive experts."""
    return routed_cases.hidden(routed_cases.doubled(args))


def _cut(sizes: Tensor, share: float) -> Tensor:
    """Near the quantile, in the widest gap close by, so that rounding moves no unit across."""
    ordered = sizes[sizes > 0].sort().values
    if len(ordered) < 2:
        return torch.tensor(0.1)
    at = int(share * len(ordered))
    near = ordered[max(at - 8, 0) : at + 9]
    widest = int((near[1:] / near[:-1]).argmax())
    return (near[widest] * near[widest + 1]).sqrt().float()


def _up_and_gate(case: Case, f: int, d: int) -> tuple[Tensor, Tensor | None]:
    both = (torch.randn(2 * f, d) * d**-0.5).to(case.dtype)
    if case.layout == "fused":
        up, gate = both[1::2], both[0::2]
    elif case.layout == "neuron":
        columns = both.t().contiguous().t()
        up, gate = columns[:f], columns[f:]
    else:
        up, gate = both[:f].clone(), both[f:].clone()
    return up, gate if case.gated else None


def _threshold(x: Tensor, weight: Tensor, bias: Tensor | None, case: Case) -> Tensor:
    """Near the quantile that leaves `density` active, in a gap between logits: the widest close by, or, for a small
    margin, the narrowest that keeps it."""
    logits = _logits(x, weight, bias)
    if logits.numel() == 0:
        return torch.tensor(0.0)
    ordered = torch.cat([logits[:1] - 2, logits, logits[-1:] + 2])
    at = round((1 - case.density) * logits.numel())
    near = range(max(at - 8, 0), min(at + 8, logits.numel()) + 1) if 0 < case.density < 1 else (at,)
    gaps = {i: float(ordered[i + 1] - ordered[i]) for i in near}
    wide = {i: gap for i, gap in gaps.items() if gap > 2 * case.margin}
    assert wide, "no gap between logits; take another seed"
    best = max(wide, key=wide.__getitem__) if case.margin >= MARGIN else min(wide, key=wide.__getitem__)
    return ((ordered[best] + ordered[best + 1]) / 2).float()


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return logits.flatten().sort().values


def errors(y: Tensor, args: tuple[Any, ...]) -> tuple[float, float]:
    """-> relative distance to the float64 result, of y and of PyTorch's own dense-and-mask in the same dtype."""
    true, own = reference.routed_ffn(*routed_cases.doubled(args)), reference.routed_ffn(*args).double()
    scale = true.norm().clamp_min(1e-30)
    assert y.shape == true.shape, (y.shape, true.shape)
    return float((y.double() - true).norm() / scale), float((own - true).norm() / scale)
