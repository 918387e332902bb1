"""The passes, and the one place that says in which order they run."""

from __future__ import annotations

from ltepass.passes.capture_graphs import CaptureGraphs
from ltepass.passes.find_ffn import FindFFN
from ltepass.passes.group_neurons import GroupNeurons
from ltepass.passes.insert_routers import InsertRouters
from ltepass.pipeline import Pass


def transform_passes(*, has_calibration: bool = False) -> tuple[Pass, ...]:
    """What `ltepass.transform` runs, read top to bottom. The last two change the model; all checks come before."""
    return (
        CaptureGraphs(),
        FindFFN(),
        GroupNeurons(has_calibration=has_calibration),
        InsertRouters(),
    )
