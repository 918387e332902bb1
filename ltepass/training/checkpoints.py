"""Which checkpoint of a stage can be trusted after a kill: the mark is written last, in one step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

STATE_FILE = "lte_state.json"


def mark_complete(folder: Path, state: dict[str, Any]) -> None:
    """Written after everything else of a checkpoint, so that a folder without it was cut short."""
    scratch = folder / f"{STATE_FILE}.tmp"
    scratch.write_text(json.dumps(state))
    os.replace(scratch, folder / STATE_FILE)


def last_complete(folder: str | Path) -> str | None:
    """The newest whole checkpoint below a stage's folder, or None."""
    found = [p for p in Path(folder).glob("checkpoint-*") if (p / STATE_FILE).is_file()]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def is_finished(checkpoint: str) -> bool:
    """Whether no step of its stage is left."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])
