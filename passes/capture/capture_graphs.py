"""capture: the model as ATen graphs.

    before:  an nn.Module, or a GraphModule in any dialect
    after:   graphs whose nodes carry the path of the module they came from; a refusal for each part that has none

Nothing of the model changes: export runs under fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltepass.passes.capture.parts import capture_all
from ltepass.passes.graph.pipeline import Tier, TransformJob
from ltepass.routed.sites import Refusal


@dataclass(frozen=True, kw_only=True)
class CaptureGraphs:
    name: str = "capture"
    tier: Tier = "exact"
    skippable: bool = False

    def __call__(self, job: TransformJob) -> str:
        captures = capture_all(job.model, job.example_inputs)
        job.captured = captures.graphs
        job.refusals += [
            Refusal(module=path, node="", check="capture", reason=f"its linears are in no graph: {why}")
            for path, why in captures.missed.items()
        ]
        nodes = sum(len(c.flow.gm.graph.nodes) for c in job.captured)
        return f"{len(job.captured)} graph(s), {nodes} nodes"
