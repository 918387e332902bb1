"""Every method that LTE is compared with, by name."""

from __future__ import annotations

from examples.compare.predictors import DejaVu, MoEfication
from examples.compare.rules import Cats, NoisyTopK, Oracle, PrunePath, RandomExperts, Rule, Teal, TopK, TrainedTeal

RULES: dict[str, type[Rule]] = {
    r.name: r
    for r in (
        Rule, Cats, Teal, TrainedTeal,
        Oracle, RandomExperts, TopK, NoisyTopK, PrunePath, MoEfication, DejaVu,
    )
}  # fmt: skip
