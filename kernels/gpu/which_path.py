"""Which path a GPU call takes, and the density that the choice goes by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from ltepass.kernels.gpu.tuning import Launch

GPUPath = Literal["one", "union", "grouped", "dense"]

_assumed: ContextVar[float | None] = ContextVar("assumed_density", default=None)


@contextmanager
def assume_density(density: float | None) -> Iterator[None]:
    """The share of (token, expert) pairs that calibration expects to be active: GPU calls in the block go by it.

    Told by whoever calls the op for a router: the op sees tensors only, and must not wait for a device to count. A
    stale value costs time, never a wrong result.
    """
    token = _assumed.set(density)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed_density() -> float | None:
    return _assumed.get()


def choose_path(n_tokens: int, density: float | None, paths: Launch) -> GPUPath:
    """The fastest exact path for a call, from host values only: the number of tokens and the calibrated density.

    one: three launches, one token. union: three launches, a weight is read when any token wants it. grouped: one
    product per expert for gate and up, dense down. dense: dense products and a mask, which no density makes slower.
    """
    limits = paths.blocks
    if n_tokens == 1:
        return "one"
    if n_tokens <= limits["UNION_ALWAYS"]:
        return "union"
    expected = 1.0 if density is None else density
    if n_tokens <= limits["UNION_TOKENS"]:
        union = 1.0 - (1.0 - expected) ** n_tokens  # tokens that choose independently: the worst case
        return "union" if union * 100 <= limits["UNION_PERCENT"] else "dense"
    return "grouped" if expected * 100 <= limits["GROUPED_PERCENT"] else "dense"
