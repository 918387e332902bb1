"""Which training a folder holds: what was asked for, written before the first step, and what came out, at the end.

What came out is quality and speed beside the dense model that it began with, measured on held-out rows.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired

import torch
from torch import Tensor

import ltepass
from ltepass.commands.bench_tables import threads_of
from ltepass.errors import ConfigError
from ltepass.measure.machine import machine
from ltepass.measure.timing import time_decoding
from ltepass.routed.json_entry import Json
from ltepass.saving.model_card import Measured
from ltepass.training.stages import held_out_perplexity
from ltepass.whole_file import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CHECKPOINTS, RECORD = "training", "run.json"
Entry = dict[str, Json]
Losses = list[tuple[int, float]]  # (step, nats per token), of the logs


class TrainingRun:
    """A training in the folder `out`. asked: all that decides its result; result: None until it is finished."""

    def __init__(self, out: Path, asked: Mapping[str, Json], *, resume: bool = False, overwrite: bool = False) -> None:
        """resume: there has to be one; overwrite: whatever is there goes. Raises ConfigError, OSError."""
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite were given; expected one of them")
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; expected a folder to write, or none yet; pass another --out")
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
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._write()

    def finish(self, result: Trained) -> Trained:
        """The model lies in the folder: the checkpoints of its stages go."""
        found: Trained = json.loads(json.dumps(result))  # as a later call will read it
        self.result = found
        self._write()
        for stage in ("soft", "hard"):
            shutil.rmtree(self.checkpoints / stage, ignore_errors=True)
        return found

    def _write(self) -> None:
        with whole_file(self._file) as file:
            file.write_text(json.dumps({"asked": self.asked, "result": self.result}, indent=2) + "\n")


def losses_of(checkpoints: Path) -> dict[str, Losses]:
    """Task losses by stage, as the newest checkpoint of each in LTETrainer's folder has them."""
    found: dict[str, Losses] = {}
    for stage in ("soft", "hard"):
        files = (checkpoints / stage).glob("checkpoint-*/trainer_state.json")
        states = [json.loads(file.read_text()) for file in files]
        history = max(states, key=lambda state: int(state["global_step"]))["log_history"] if states else []
        losses = [(int(log["step"]), log.get("lte_task_loss", log.get("loss"))) for log in history]
        if logged := [(step, float(loss)) for step, loss in losses if loss is not None]:
            found[stage] = logged
    return found


ROWS = 16  # that are measured, at most
NEW_TOKENS, WARMUP = 40, 8  # decoded, and of them not timed


class Trained(Measured):
    """And the losses of each stage; older records have none."""

    losses: NotRequired[dict[str, Losses]]


def measured(model: PreTrainedModel, dense: PreTrainedModel, held_out: Mapping[str, Tensor]) -> Measured:
    """model: in hard mode, and lowered afterwards. held_out: columns [n, T], on the models' device."""
    rows = [{name: column[i : i + 1] for name, column in held_out.items()} for i in range(len(held_out["labels"]))]
    n, length = held_out["labels"].shape
    model.eval()
    found: Measured = {
        "held_out": f"{n} x {length} tokens",
        "dense_perplexity": held_out_perplexity(dense, rows),
        "perplexity": held_out_perplexity(model, rows),
        "sparsity": ltepass.measure_sparsity(model, rows),
        "tokens_per_s": None,
        "machine": f"{machine()}, {threads_of(torch.get_num_threads())}",
    }
    row = rows[0]
    ids = row["input_ids"][0, : int(row["attention_mask"].sum()) if "attention_mask" in row else length]
    prompt, tokens = ids[: len(ids) // 4], ids[len(ids) // 4 :][:NEW_TOKENS]
    if len(prompt) and len(tokens) > 4:
        sides = {"dense": dense, "lowered": ltepass.lower(model, scope="ffn")}
        times = time_decoding(sides, prompt, tokens, warmup=min(WARMUP, len(tokens) // 2))
        found["tokens_per_s"] = {side: 1 / statistics.median(seconds) for side, seconds in times.items()}
    return found
