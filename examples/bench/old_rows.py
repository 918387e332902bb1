"""Rows of bench_model.csv, which `ltepass bench model` wrote before it measured the byte ideal of a token."""

from __future__ import annotations

from dataclasses import dataclass

from ltepass.measure.records import Environment


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Environment):
    """cap: dense time without what inactive neurons took of it; lowered tokens went beyond, so it is shown no more."""

    model: str
    how: str
    dtype: str
    group_size: int
    active: float
    router: float
    sparsity: float
    perplexity: float
    perplexity_dense: float
    tokens: int
    dense_ms: float
    dense_p20_ms: float
    dense_p80_ms: float
    lowered_ms: float
    lowered_p20_ms: float
    lowered_p80_ms: float
    without_ffns_ms: float
    speedup: float
    cap: float
    share_of_cap: float
