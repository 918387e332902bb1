"""A workshop with text enough for intervals, in the training domain and outside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from examples.compare.measured import Measured, measure_dense
from examples.compare.study import Budget, Data, load_data, load_others
from examples.compare.workshop import Workshop
from ltepass.corpora import other_texts

UNTUNED, TUNED = DENSE = ("dense-untuned", "dense")


class IntervalWorkshop(Workshop):
    """blocks: of a text, where it has so many; others: texts outside the training domain, by name, None for those that
    every install has."""

    def __init__(
        self, blocks: int, others: Mapping[str, str] | None, name: str, budget: Budget, texts: Path | None, work: Path
    ) -> None:
        super().__init__(name, budget, texts, work)
        self.blocks, self.others = blocks, other_texts() if others is None else others
        self._dense: dict[tuple[str, int], tuple[Measured, float]] = {}

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            data = load_data(self.budget, self.texts, self.tokenizer, seed, self.blocks)
            others = load_others(self.budget, self.others, self.tokenizer, max(self.budget.test, self.blocks))
            self._data[seed] = replace(data, measured={**data.measured, **others})
        return self._data[seed]

    def dense(self, method: str, seed: int) -> tuple[Measured, float]:
        """The dense model as it came or tuned, on every text, and the seconds that this took; done once."""
        if (method, seed) not in self._dense:
            start = time.perf_counter()
            model = self.base() if method == UNTUNED else self.tuned(seed)
            measured = measure_dense(model, self.data(seed).measured)
            self._dense[method, seed] = measured, time.perf_counter() - start
        return self._dense[method, seed]

    def better_dense(self, seed: int) -> dict[str, Tensor]:
        """Losses of the one of the two that is better on each text: what a user would take instead there."""
        untuned, tuned = (self.dense(method, seed)[0] for method in DENSE)
        return {
            text: min((untuned[text].losses, tuned[text].losses), key=lambda losses: float(losses.mean()))
            for text in tuned
        }
