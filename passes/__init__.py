"""The passes, and the one place that says in which order they run."""

from __future__ import annotations

from ltepass.passes.capture.capture_graphs import CaptureGraphs
from ltepass.passes.find.find_ffn import FindFFN
from ltepass.passes.graph.pipeline import Pass
from ltepass.passes.group.group_neurons import GroupNeurons
from ltepass.passes.insert.insert_routers import InsertRouters


def transform_passes(*, has_calibration: bool = False) -> tuple[Pass, ...]:
    """What `ltepass.transform` runs, read top to bottom. The last two change the model; all checks come before."""
    return (
        CaptureGraphs(),
        FindFFN(),
        GroupNeurons(has_calibration=has_calibration),
        InsertRouters(),
    )
