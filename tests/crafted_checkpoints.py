"""Folders of older versions, copied and changed by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CHECKPOINTS = Path(__file__).parent / "checkpoints"
IDS = torch.arange(3, 35).reshape(2, 16)


def copied(name: str, folder: Path) -> dict[str, Any]:
    """A fixture's copy, and its config."""
    for file in (CHECKPOINTS / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def craft(site: dict[str, Any], field: str, payload: str) -> None:
    """One field of a site becomes a payload, as a path that begins like the true one."""
    if field != "param":
        before = site[field] or "model"
        beside = before.rpartition(".")[0] if field == "router" and "." not in payload else before
        site[field] = f"{beside}.{payload}"
    elif "parameters" in site:
        site["parameters"][0] += f".{payload}"
    else:
        before = site["neurons"][0]["param"]
        for rows in (*site["neurons"], site["up_rows"], site["gate_rows"], site["down_rows"]):
            rows["param"] = rows["param"].replace(before, f"{before}.{payload}")
