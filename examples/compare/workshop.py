"""Where a command keeps its models, and what it has loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.compare import models
from examples.compare.study import DEVICE, Budget, Data, load_data
from examples.compare.tuning import tune_dense


class Workshop:
    """Where a command keeps its models, and what it has loaded.

    name: of the preset, in the folders' names. texts: folder of *.txt files, None for text that ships with Python.
    """

    def __init__(self, name: str, budget: Budget, texts: Path | None, work: Path) -> None:
        self.name, self.budget, self.texts, self.work = name, budget, texts, work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = models.tokenizer(budget.model)
        self._data: dict[int, Data] = {}

    def data(self, seed: int) -> Data:
        if seed not in self._data:
            self._data[seed] = load_data(self.budget, self.texts, self.tokenizer, seed)
        return self._data[seed]

    def base(self) -> Any:
        """The model as it came."""
        return models.load(self.budget.model, self.work, self.data(0).train).to(DEVICE)

    def tuned(self, seed: int) -> Any:
        """The dense model fine-tuned on the same tokens; trained once for each seed."""
        folder = self.work / f"dense-{self.name}-{seed}"
        if not (folder / "config.json").exists():
            model = self.base()
            tune_dense(model, self.data(seed), self.budget, folder / "log", seed)
            model.save_pretrained(folder)
        return models.load(str(folder), self.work).to(DEVICE)
