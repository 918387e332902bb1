"""Which checkpoint of a stage can be trusted after a kill: the mark is written last, in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from ltepass.whole_file import whole_file

STATE_FILE = "lte_state.json"
APART_FILE = "lte_trained.safetensors"


def mark_complete(folder: Path, state: Mapping[str, object]) -> None:
    """Written after everything else of a checkpoint, so that a folder without it was cut short."""
    with whole_file(folder / STATE_FILE) as file:
        file.write_text(json.dumps(state))


def last_complete(folder: str | Path) -> str | None:
    """The newest whole checkpoint below a stage's folder, or None."""
    found = [p for p in Path(folder).glob("checkpoint-*") if (p / STATE_FILE).is_file()]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def is_finished(checkpoint: str) -> bool:
    """Whether no step of its stage is left."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def saved_apart(model: nn.Module, routed: Routed) -> dict[str, Tensor]:
    """Of a model with the user's adapters: what learns, and the routers, that PEFT does not save with an adapter."""
    root, sites = routed.model, routed.sites
    adapted = hasattr(model, "peft_config") or getattr(root, "_hf_peft_config_loaded", False)
    if not adapted or not any(isinstance(root.get_submodule(site.router), Router) for site in sites):
        return {}
    learns = {name for name, p in root.named_parameters() if p.requires_grad}
    routers = tuple(f"{site.router}." for site in sites)
    return {name: t for name, t in root.state_dict().items() if name in learns or name.startswith(routers)}


def save_apart(model: nn.Module, routed: Routed, folder: Path) -> None:
    tensors = saved_apart(model, routed)
    if tensors:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / APART_FILE)


def load_apart(root: nn.Module, folder: Path) -> None:
    if (folder / APART_FILE).is_file():
        root.load_state_dict(load_file(folder / APART_FILE), strict=False)
