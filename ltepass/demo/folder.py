"""The demo's output folder: what each finished stage found, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ltepass.config import ROUTERS, RouterKind, check_sparsity
from ltepass.demo.results import Results, StageName
from ltepass.errors import ConfigError
from ltepass.measure.machine import facts

MODELS = ("smollm2", "tiny")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What `ltepass demo` may be asked. steps: optimizer steps of each training; None takes the default."""

    model: Literal["smollm2", "tiny"] = "smollm2"
    target_sparsity: float = 0.5
    steps: int | None = None
    router: RouterKind = "linear"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_sparsity(self.target_sparsity, "--target-sparsity")
        if self.model not in MODELS:
            raise ConfigError(f"--model is {self.model!r}; expected one of {', '.join(MODELS)}")
        if self.router not in ROUTERS:
            raise ConfigError(f"--router is {self.router!r}; expected one of {', '.join(ROUTERS)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}; expected at least 1")


class Folder:
    """`results.json` in one folder: the options, the machine, and one entry for each finished stage."""

    def __init__(self, path: Path, options: DemoOptions, *, fresh: bool = False) -> None:
        self.path = path
        self.file = path / "results.json"
        new = {"options": asdict(options), "machine": facts(), "stages": {}}
        self.results: Results = json.loads(json.dumps(new))  # as a later call will read it
        path.mkdir(parents=True, exist_ok=True)
        if self.file.exists() and not fresh:
            saved = json.loads(self.file.read_text())
            if saved["options"] != self.results["options"]:
                raise ConfigError(
                    f"{path} holds a run with {saved['options']}; this one asks for {self.results['options']}; pass "
                    "another --out, or --fresh to start over in this folder"
                )
            self.results = saved
        self._write()

    def finished(self, stage: StageName) -> bool:
        return stage in self.results["stages"]

    def finish(self, stage: StageName, result: Mapping[str, object], seconds: float) -> None:
        entry = {**result, "seconds": round(seconds, 1)}
        self.results["stages"][stage] = json.loads(json.dumps(entry))
        self._write()

    def _write(self) -> None:
        """In one step, so that an interruption leaves the last whole file."""
        scratch = self.file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.results, indent=2) + "\n")
        os.replace(scratch, self.file)
