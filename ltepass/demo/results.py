"""What results.json holds: the options, the machine, and an entry for every finished stage; and the output folder that
holds it, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, get_args

from ltepass.demo.options import DemoOptions, Options
from ltepass.errors import ConfigError
from ltepass.measure.machine import facts
from ltepass.measure.timing import Summary
from ltepass.whole_file import whole_file

StageName = Literal["prepare", "dense", "tune_dense", "calibrate", "train", "quality", "speed", "generate", "reload"]
STAGE_NAMES: tuple[StageName, ...] = get_args(StageName)
Losses = list[tuple[int, float]]  # (step, nats per token)


class Cost(TypedDict, total=False):
    """Of a stage, known once it has finished."""

    seconds: float
    peak_gb: float


class Prepared(Cost):
    name: str
    parameters: int
    dtype: str
    train_blocks: int
    test: str
    steps: int


class Dense(Cost):
    perplexity: float


class TunedDense(Cost):
    perplexity: float
    tokens: int
    losses: Losses


class Calibrated(Cost):
    sites: int
    group_size: int | None
    grouping: str
    tokens: int
    perplexity: float


class Trained(Cost):
    losses: dict[str, Losses]


class Plain(TypedDict):
    """The fine-tuned dense model in a plain format; bytes_share: of its linears, over what they were."""

    perplexity: float
    bytes_share: float


class OnText(TypedDict):
    """Of one kind of text: perplexities of LTE and of the better dense model there, their ratio with its 95 % interval,
    and the mean FFN sparsity."""

    tokens: int
    perplexity: float
    dense: float
    ratio: float
    low: float
    high: float
    sparsity: float


class Quality(Cost):
    """sparsity: by site name; plain: by format; texts: by kind, the training domain's first; older runs lack both."""

    perplexity: float
    sparsity: dict[str, float]
    plain: NotRequired[dict[str, Plain]]
    texts: NotRequired[dict[str, OnText]]


class Speed(Summary):
    """ms: of every timed token, by side."""

    compile_mode: str
    dtype: str
    threads: int
    notes: list[str]
    ms: dict[str, list[float]]


class FinishedSpeed(Speed, Cost):
    """Apart from Speed, for a summary may not be unpacked where keys may be missing."""


class Generated(Cost):
    prompt: str
    dense: str
    lowered: str


class Reloaded(Cost):
    equal: bool
    max_difference: float


class Stages(TypedDict, total=False):
    prepare: Prepared
    dense: Dense
    tune_dense: TunedDense
    calibrate: Calibrated
    train: Trained
    quality: Quality
    speed: FinishedSpeed
    generate: Generated
    reload: Reloaded


class Results(TypedDict):
    options: Options
    machine: dict[str, str | int | None]
    stages: Stages


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
        with whole_file(self.file) as file:
            file.write_text(json.dumps(self.results, indent=2) + "\n")


def machine_line(results: Results) -> str:
    """One sentence: where, with what, how long, how much memory."""
    at, stages = results["machine"], results["stages"]
    costs: list[Cost] = [stages[name] for name in STAGE_NAMES if name in stages]
    minutes = sum(cost["seconds"] for cost in costs) / 60
    memory = max((cost.get("peak_gb", 0.0) for cost in costs), default=0.0)
    device = results["options"]["device"]
    gpu = f", {at['gpu']}" if device.startswith("cuda") else ""
    return (
        f"{at['cpu']}, {at['cores']} cores, {at['isa']}{gpu}, torch {at['torch']}, Python {at['python']}; "
        f"device {device}, seed {results['options']['seed']}; {minutes:.1f} minutes, at most {memory:.1f} GB"
    )
