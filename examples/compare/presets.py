"""What the frontier measures: its methods, the presets of budgets and points, and the cells of a preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from examples.compare.cuts import CUTS
from examples.compare.study import (
    Budget,
    Recipe,
)

CALIBRATED = "lte-calibrated"
PROXY, PROXY_TRAINED = "lte-proxy", "lte-proxy-trained"
PROXIES = (PROXY, "lte-proxy-warm", PROXY_TRAINED)  # of single neurons; the other rows' routers are linear
CALIBRATED_ONLY = (CALIBRATED, PROXY)
STARTS = (CALIBRATED, "lte-warm", PROXY, "lte-proxy-warm")
POST_HOC = ("cats", "teal", "moefication", "dejavu", "oracle", *STARTS)
OURS = (*CUTS, PROXY_TRAINED)
FROM_ONE = "lte+cuts"  # of which the first point's checkpoint is measured at the others too
ONE_CHECKPOINT = f"{FROM_ONE}-one-checkpoint"
TRAINED = ("topk", "prunepath", "noisy-topk", "random", "teal-trained")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """points: FFN sparsities of ours and the post-hoc methods; trained_points: of the baselines with a training;
    between: more points of methods whose bytes at `points` lie far from LTE's, for the table at equal bytes; blocks: of
    a text for an interval, where it has so many (64 of 512 tokens are 32,768)."""

    budget: Budget
    points: tuple[float, ...]
    trained_points: tuple[float, ...]
    between: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: int = 1
    blocks: int = 64
    recipe: Recipe = field(default_factory=Recipe)  # of the candidates in ablations.py ("recipe")


ONE_BUDGET = Recipe(budget="model")  # measured better on SmolLM2's 30 layers, and worse on the tiny model's four
BETWEEN: dict[str, tuple[float, ...]] = {"cats": (0.6, 0.7), "teal": (0.4, 0.45)}
SMOLLM2 = partial(Budget, model="smollm2", length=256, group_size=8, learning_rate=3e-4)
PRESETS = {
    "smoke": Preset(
        budget=Budget(
            model="tiny", steps=30, batch=8, length=128, learning_rate=1e-3, test=2, test_length=128, calibration=16,
            group_size=8,
        ),
        points=(0.5, 0.8),
        trained_points=(0.5,),
        blocks=8,
    ),
    "ablation": Preset(  # of ablations.py and tasks.py
        budget=Budget(
            model="tiny", steps=60, batch=8, length=128, learning_rate=1e-3, test=12, test_length=128, calibration=32,
            group_size=8,
        ),
        points=(0.5, 0.8),
        trained_points=(0.5, 0.8),
    ),
    "tiny": Preset(
        budget=Budget(
            model="tiny", steps=60, batch=8, length=128, learning_rate=1e-3, test=12, test_length=128, calibration=32,
            group_size=8,
        ),
        points=(0.5, 0.7, 0.8, 0.9),
        trained_points=(0.5, 0.8),
        seeds=3,
        blocks=256,
    ),
    "small": Preset(
        budget=SMOLLM2(steps=24, batch=4, test=2, test_length=512, calibration=96),
        blocks=16,
        points=(0.5, 0.7, 0.8, 0.9),
        trained_points=(0.5,),
        between=BETWEEN,
        recipe=ONE_BUDGET,
    ),
    "cpu": Preset(
        budget=SMOLLM2(steps=48, batch=4, test=4, test_length=512, calibration=192),
        points=(0.5, 0.7, 0.8, 0.9),
        trained_points=(0.5,),
        between={"cats": (0.6,), "teal": (0.4, 0.45, 0.6, 0.65), "teal-trained": (0.45,)},
        recipe=ONE_BUDGET,
    ),
    "long": Preset(  # what more tokens change at the point where routers alone are not ahead
        budget=SMOLLM2(steps=144, batch=4, test=4, test_length=512, calibration=576),
        points=(0.5,),
        trained_points=(0.5,),
        between=BETWEEN,
        recipe=ONE_BUDGET,
    ),
    "gpu": Preset(
        budget=SMOLLM2(
            length=512, steps=2000, batch=32, test=16, test_length=512, calibration=128,
            dtype="bfloat16",
        ),
        points=(0.5, 0.7, 0.8, 0.9),
        trained_points=(0.5, 0.7, 0.8, 0.9),
        seeds=3,
        recipe=ONE_BUDGET,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity and seed; dense stands at 0."""

    method: str
    sparsity: float
    seed: int


def cells(preset: Preset) -> Iterator[Cell]:
    """In an order in which what is prepared for one serves the next."""
    for seed in range(preset.seeds):
        yield Cell("dense-untuned", 0.0, seed)
        yield Cell("dense", 0.0, seed)
        for method in OURS:
            for s in preset.points:
                yield Cell(method, s, seed)
        for s in preset.points[1:]:
            yield Cell(ONE_CHECKPOINT, s, seed)
        for method in TRAINED:
            for s in sorted({*preset.trained_points, *preset.between.get(method, ())}):
                yield Cell(method, s, seed)
        for method in POST_HOC:
            for s in sorted({*preset.points, *preset.between.get(method, ())}):
                yield Cell(method, s, seed)
