"""The contract of a pass, and the one runner: of transform's passes, and of the backend's.

Every graph is linted before the first pass and after each; how many nodes of each kind came or went is counted by the
runner, so that no pass reports a change that did not happen. Where a pass fails, what was begun is undone.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, TypeVar

from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from ltepass.config import LTEConfig
from ltepass.errors import ConfigError
from ltepass.kernels.weight_formats import Parts
from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.node_kinds import op_name
from ltepass.routed.sites import FFNSite, Refusal
from ltepass.routed.undo import all_or_nothing
from ltepass.routed.which_sites import Selection

log = logging.getLogger("ltepass")

# What a pass may do to what the model computes. exact: not a bit of it (dense mode, for a pass that inserts gates).
# rounding: sums are taken in another order, or by another kernel.
# quantised: weights of fewer bits, where that was asked for.
Tier = Literal["exact", "rounding", "quantised"]
NAMES = (
    "capture",
    "find_ffn",
    "group_neurons",
    "insert_routers",
    "lower_routed_ffn",
    "lower_tiers",
    "lower_linears",
    "pack_tiers",
    "quantise_routed_ffn",
    "lay_out_neurons",
    "merge_linears",
    "quantise_linears",
    "shortlist_head",
)  # of all passes there are
SKIP = "LTEPASS_SKIP"  # environment: names of passes to leave out, separated by commas; to find out which one did it


class Job(Protocol):
    """What travels from pass to pass."""

    def graphs(self) -> Sequence[Graph]:
        """Those that are linted and counted."""

    def whole(self, work: Callable[[], None]) -> None:
        """Run work; where it fails, everything is as before."""


J = TypeVar("J", bound=Job)
J_contra = TypeVar("J_contra", bound=Job, contravariant=True)


class Pass(Protocol[J_contra]):
    """A frozen keyword-only dataclass. skippable: the passes after it do without."""

    @property
    def name(self) -> str: ...

    @property
    def tier(self) -> Tier: ...

    @property
    def skippable(self) -> bool: ...

    def __call__(self, job: J_contra) -> str:
        """Run, and say in a few words what changed ("unchanged" when nothing did)."""


@dataclass
class TransformJob:
    """Of `ltepass.transform`. `model` is untouched until the passes that say so in their docstring.

    has_calibration: batches follow, so grouping methods that use data may wait for them.
    owner_graphs: by owner, its own forward's for training and for evaluation; None where it cannot be traced.
    """

    model: nn.Module
    config: LTEConfig
    example_inputs: object = None
    has_calibration: bool = False
    selection: Selection = field(default_factory=Selection)
    captured: list[Captured] = field(default_factory=list)
    sites: list[FFNSite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    owner_graphs: dict[str, tuple[Graph, Graph] | None] = field(default_factory=dict)
    permutations: dict[str, Tensor] = field(default_factory=dict)  # by site; the routers remember them

    def graphs(self) -> list[Graph]:
        own = [self.model.graph] if isinstance(self.model, GraphModule) else []
        return [*own, *(captured.flow.gm.graph for captured in self.captured)]

    def whole(self, work: Callable[[], None]) -> None:
        all_or_nothing(self.model, work)


@dataclass
class GraphJob:
    """Of the backend: one graph of Dynamo's. notes: for each gate left masked-dense, its router's path and why.

    codes: of an export, by the names of leaves in floats: what torchao holds in their place, for an op to read.
    lowered, linears: how many regions, and how many other linears, became ops.
    """

    gm: GraphModule
    codes: dict[str, Parts] = field(default_factory=dict)
    lowered: int = 0
    linears: int = 0
    notes: dict[str, str] = field(default_factory=dict)

    def graphs(self) -> list[Graph]:
        return [self.gm.graph]

    def whole(self, work: Callable[[], None]) -> None:
        before = Graph()
        before.output(before.graph_copy(self.gm.graph, {}))
        try:
            work()
        except BaseException:
            self.gm.graph = before
            raise


def run_passes(passes: Sequence[Pass[J]], job: J) -> J:
    """Run in order; where one fails, the job's model or graph is as before the first.

    Passes that the environment variable LTEPASS_SKIP names are left out. Raises ConfigError where it names no pass, or
    one that those after it need.
    """
    skipped = skipped_by_name()
    wrong = [name for name in skipped if name not in NAMES]
    wrong += [p.name for p in passes if p.name in skipped and not p.skippable]
    if wrong:
        raise ConfigError(
            f"{SKIP} names {wrong[0]!r}; expected passes that others do without, of {', '.join(NAMES)}; leave it out"
        )
    job.whole(partial(_run, [p for p in passes if p.name not in skipped], job))
    return job


def skipped_by_name() -> list[str]:
    return [name.strip() for name in os.environ.get(SKIP, "").split(",") if name.strip()]


def _run(passes: Sequence[Pass[J]], job: J) -> None:
    _lint(job)
    for p in passes:
        start, before = time.perf_counter(), _count(job)
        try:
            said = p(job)
            _lint(job)
        except BaseException as e:
            e.add_note(f"(in pass {p.name!r})")
            raise
        changed = _difference(before, _count(job))
        log.info("%s: %s%s (%s, %.2f s)", p.name, said, changed, p.tier, time.perf_counter() - start)


def _lint(job: Job) -> None:
    for graph in job.graphs():
        graph.lint()


def _count(job: Job) -> Counter[str]:
    return Counter(op_name(node) or node.op for graph in job.graphs() for node in graph.nodes)


def _difference(before: Counter[str], after: Counter[str]) -> str:
    """ "; linear: 12 -> 4, routed_ffn: 0 -> 2" for the kinds of node whose number changed."""
    kinds = [kind for kind in sorted({*before, *after}) if before[kind] != after[kind]]
    return "".join(f"{', ' if i else '; '}{kind}: {before[kind]} -> {after[kind]}" for i, kind in enumerate(kinds))


def told(done: int, how: str, left: Counter[str], *, what: str = "linears") -> str:
    """What a pass says: how many of what it changed, and how many it left for which reason."""
    reasons = "".join(f", {n} left: {reason}" for reason, n in left.items())
    return f"{done} {what} {how}{reasons}" if done else f"unchanged{reasons}"
