"""How sparse a model is to be while it is pruned step by step."""

from __future__ import annotations

from dataclasses import dataclass

from ltepass.config import check_sparsity
from ltepass.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CubicSchedule:
    """The sparsity to prune to at a step: fast at first, slow where little is left.

    Zhu and Gupta, arXiv 1710.01878, equation 1.

    Arguments:
        final: sparsity from step `end` on, in [0, 1). end: steps.
        initial: sparsity up to step `begin`, in [0, 1).
        begin: steps.
    Raises: ConfigError.
    Example:
        >>> schedule = ltepass.CubicSchedule(final=0.8, end=100)
        >>> [round(schedule(step), 2) for step in (0, 50, 100, 200)]
        [0.0, 0.7, 0.8, 0.8]
    """

    final: float
    end: int
    initial: float = 0.0
    begin: int = 0

    def __post_init__(self) -> None:
        for name in ("initial", "final"):
            check_sparsity(getattr(self, name), name)
        if self.final < self.initial:
            raise ConfigError(f"final is {self.final}; expected at least initial, {self.initial}: nothing grows back")
        if not 0 <= self.begin < self.end:
            raise ConfigError(f"begin is {self.begin} and end {self.end}; expected steps with 0 <= begin < end")

    def __call__(self, step: int) -> float:
        left = 1.0 - min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))
        return self.final + (self.initial - self.final) * left**3
