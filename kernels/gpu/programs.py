"""What makes a function a Triton kernel, and how kernels of one call follow each other."""

# triton and inductor both evaluate a kernel's annotations, so only tl.constexpr may stand there:
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Typed, so that mypy --strict accepts what it decorates; the result is triton's own JITFunction.
jit: Callable[[Callable[..., Any]], Any] = triton.jit


@jit
def wait_for_previous(PDL: tl.constexpr):
    """First statement of a kernel whose programs may start while the kernel before still runs (Hopper and later)."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs take the places that this one's leave free, and wait there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
