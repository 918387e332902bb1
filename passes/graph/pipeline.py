"""The runner of passes: names the pass that failed, logs what each one changed and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from ltepass.config import LTEConfig
from ltepass.passes.graph.captured import Captured
from ltepass.routed.sites import FFNSite, Refusal
from ltepass.routed.undo import all_or_nothing

log = logging.getLogger("ltepass")


@dataclass
class Job:
    """What travels from pass to pass. `model` is untouched until the passes that say so in their docstring."""

    model: nn.Module
    config: LTEConfig
    example_inputs: Any = None
    captured: list[Captured] = field(default_factory=list)
    sites: list[FFNSite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    permutations: dict[str, Tensor] = field(default_factory=dict)  # by site; the routers remember them


class Pass(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, job: Job) -> str:
        """Run, and say in a few words what changed ("unchanged" when nothing did)."""


def run_passes(passes: Sequence[Pass], job: Job) -> Job:
    """Run in order; graphs are linted after each pass. Where one fails, the model is as before the first."""
    return all_or_nothing(job.model, partial(_run, passes, job))


def _run(passes: Sequence[Pass], job: Job) -> Job:
    for p in passes:
        start = time.perf_counter()
        try:
            change = p(job)
            for captured in job.captured:
                captured.flow.gm.graph.lint()
        except BaseException as e:
            e.add_note(f"(in pass {p.name!r})")
            raise
        log.info("%s: %s (%.2f s)", p.name, change, time.perf_counter() - start)
    return job
