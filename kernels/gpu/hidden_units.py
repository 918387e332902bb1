"""Hidden units from the sums of up and gate: the activations, and the cut."""

# triton and inductor both evaluate a kernel's annotations, so only tl.constexpr may stand there:
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton.language as tl

from ltepass.kernels.gpu.programs import jit


@jit
def activate(v, ACT: tl.constexpr):
    """v: fp32, any shape. relu keeps NaN, as torch does; v (1 + tanh u) / 2 = v sigmoid(2 u) in gelu_tanh."""
    if ACT == "silu":
        out = v * tl.sigmoid(v)
    elif ACT == "gelu":
        out = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        out = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == "quick_gelu":
        out = v * tl.sigmoid(1.702 * v)
    elif ACT == "relu":
        out = tl.where(v < 0, 0.0, v)
    elif ACT == "relu2":
        out = tl.where(v < 0, 0.0, v * v)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        out = v
    return out


@jit
def hidden_units(up, gate, cut, ACT: tl.constexpr, GATED: tl.constexpr, HAS_CUT: tl.constexpr):
    """fp32 sums of the two linears -> hidden units, still fp32: rounding happens once, when they are stored.

    Units of a size up to the cut are 0; NaN is not small.
    """
    out = activate(gate if GATED else up, ACT)
    if GATED:
        out *= up
    if HAS_CUT:
        out = tl.where(tl.abs(out) <= tl.load(cut), 0.0, out)
    return out
