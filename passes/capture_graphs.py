"""capture: the model as ATen graphs.

    before:  an nn.Module, or a GraphModule in any dialect
    after:   graphs whose nodes carry the path of the module they came from

Nothing of the model changes: export runs under fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltepass.capture import capture
from ltepass.pipeline import Job


@dataclass(frozen=True, kw_only=True)
class CaptureGraphs:
    name: str = "capture"

    def __call__(self, job: Job) -> str:
        job.captured = [capture(job.model, job.example_inputs)]
        nodes = sum(len(c.flow.gm.graph.nodes) for c in job.captured)
        return f"{len(job.captured)} graph(s), {nodes} nodes"
