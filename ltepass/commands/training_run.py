"""Which training a folder holds: what was asked for, written before the first step, and what came out, at the end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ltepass.commands.trained import Trained
from ltepass.errors import ConfigError
from ltepass.routed.json_entry import Json

CHECKPOINTS, RECORD = "training", "run.json"
Entry = dict[str, Json]


class TrainingRun:
    """A training in the folder `out`. asked: all that decides its result; result: None until it is finished."""

    def __init__(self, out: Path, asked: Mapping[str, Json], *, resume: bool = False, overwrite: bool = False) -> None:
        """resume: there has to be one; overwrite: whatever is there goes. Raises ConfigError, OSError."""
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite were given; expected one of them")
        self.checkpoints = out / CHECKPOINTS
        self._file = self.checkpoints / RECORD
        self.asked: Entry = json.loads(json.dumps(asked))  # as a later call will read it
        self.result: Trained | None = None
        self.resumes = self._file.is_file() and not overwrite
        if resume and not self.resumes:
            raise ConfigError(f"{out} holds no training to resume; leave out --resume to start one")
        if self.resumes:
            self._go_on(out)
        elif not overwrite and out.is_dir() and any(path != self.checkpoints for path in out.iterdir()):
            raise ConfigError(f"{out} is there, and no `ltepass train` wrote it; pass another --out, or --overwrite")
        else:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def _go_on(self, out: Path) -> None:
        try:
            held = json.loads(self._file.read_text())
            before: Entry = dict(held["asked"])
            self.result = held["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._file} is no record of a training; pass --overwrite to start over") from error
        other = [name for name in before | self.asked if before.get(name) != self.asked.get(name)]
        if other:
            what = ", ".join(f"{name} {before.get(name)} (now {self.asked.get(name)})" for name in other)
            raise ConfigError(f"{out} holds a training with {what}; pass another --out, or --overwrite to start over")

    def begin(self) -> None:
        """Nothing failed before the first step: from now on the folder is this training's."""
        self._write()

    def finish(self, result: Trained) -> Trained:
        """The model lies in the folder: the checkpoints of its stages go."""
        self.result = result
        self._write()
        for stage in ("soft", "hard"):
            shutil.rmtree(self.checkpoints / stage, ignore_errors=True)
        return result

    def _write(self) -> None:
        """In one step, so that a kill leaves the last whole file."""
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps({"asked": self.asked, "result": self.result}, indent=2) + "\n")
        os.replace(scratch, self._file)


def digest(columns: Mapping[str, Tensor]) -> str:
    """Of all numbers of a training's data."""
    found = hashlib.sha256()
    for name, tensor in sorted(columns.items()):
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]
