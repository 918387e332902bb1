"""The passes, and the one place that says in which order they run."""

from __future__ import annotations

from ltepass.passes.capture.capture_graphs import CaptureGraphs
from ltepass.passes.find.find_ffn import FindFFN
from ltepass.passes.graph.pipeline import Pass, TransformJob
from ltepass.passes.group.group_neurons import GroupNeurons
from ltepass.passes.insert.insert_routers import InsertRouters
from ltepass.passes.lower.backend import BACKEND as BACKEND

# What `ltepass.transform` runs. The last two change the model; all checks come before.
TRANSFORM: tuple[Pass[TransformJob], ...] = (
    CaptureGraphs(),
    FindFFN(),
    GroupNeurons(),
    InsertRouters(),
)
