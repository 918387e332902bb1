"""What results.json holds: the options, the machine, and an entry for every finished stage."""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

from ltepass.demo.speed import Summary

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


class Quality(Cost):
    """sparsity: by site name; plain: by format."""

    perplexity: float
    sparsity: dict[str, float]
    plain: dict[str, Plain]


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


class Options(TypedDict):
    """`DemoOptions` as JSON."""

    model: str
    target_sparsity: float
    steps: int | None
    router: str
    seed: int
    device: str


class Results(TypedDict):
    options: Options
    machine: dict[str, str | int | None]
    stages: Stages
