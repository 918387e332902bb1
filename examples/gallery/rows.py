"""What a run of an example measured: one row for each model that was scored, kept in `rows.csv`."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from ltepass.measure.machine import machine
from ltepass.version import __version__

PATH = Path(__file__).parent / "rows.csv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """side: "dense", the kind of router, or what a result is set beside; target: sparsity asked for.

    equal: share of inputs to which lowered answers as hard eager does. seconds: of this row alone.
    """

    example: str
    data: str
    model: str
    metric: str
    side: str
    stage: str  # "trained", or "calibrated" alone
    target: float
    seed: int
    value: float
    sparsity: float = 0.0  # measured, of inputs that nothing was trained on
    equal: float = 1.0
    sites: int = 0
    lowered: int = 0
    seconds: float
    machine: str
    versions: str
    note: str = ""


def here(*packages: str) -> dict[str, str]:
    """Machine and versions, as a row has them. packages: beside torch, transformers and ltepass."""
    named = {name: version(name) for name in ("transformers", *packages)}
    versions = {"ltepass": __version__, "torch": torch.__version__, **named}
    return {"machine": machine(), "versions": "; ".join(f"{name} {number}" for name, number in versions.items())}


def read(path: Path = PATH) -> list[Row]:
    """All rows of a file; none where there is no file."""
    if not path.exists():
        return []
    types = {"str": str, "int": int, "float": float}
    kinds = {field.name: types[str(field.type)] for field in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def keep(rows: Iterable[Row], path: Path = PATH) -> None:
    """Writes them in the place of what an earlier run of the same example and seed left."""
    rows = list(rows)
    fresh = {(row.example, row.seed) for row in rows}
    others = [row for row in read(path) if (row.example, row.seed) not in fresh]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in sorted([*others, *rows], key=lambda row: (row.example, row.seed)):
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
