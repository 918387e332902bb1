"""One row of the census behind `ltepass coverage`: what transform does to one architecture.

It says what was captured, found and refused, and whether the gated model still computes the same: dense mode against
the original, and the lowered model against hard mode in eager, the decisions first and then the values.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltepass import transformers_hook
from ltepass.config import LTEConfig
from ltepass.errors import CaptureError, LoweringError, NoFFNFoundError
from ltepass.passes import TRANSFORM
from ltepass.passes.graph.pipeline import TransformJob, run_passes
from ltepass.routed.routed import Routed, routers_of
from ltepass.routed.sites import Refusal

TOLERANCE = 1e-5  # relative to the largest output value, fp32
GROUP_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Example:
    """A model in eval mode, the kwargs that it runs with, and what transform gets (None: it makes its own)."""

    model: nn.Module
    inputs: dict[str, Any]
    traced: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture.

    status: "ok"; "no dense FFN"; or the step that failed: "build", "capture", "transform", "dense", "masks", "lowered",
        "stopped" (time or memory).
    graphs, nodes: of the capture. named: linears with a usual name of a dense FFN's second one; found: those of them
        that are sites; the difference stands in `unfound`.
    refusals: "check: reason" by number of places. Errors are relative to the largest output value.
    lowered: sites that call the sparse op, also those that the inputs do not reach (an image tower).
    gates_act: whether hard mode at a random start changes the output, so that the comparisons mean something.
    """

    name: str
    model: str = ""
    status: str = "ok"
    graphs: int = 0
    nodes: int = 0
    sites: int = 0
    kinds: str = ""
    activations: str = ""
    named: int = 0
    found: int = 0
    unfound: str = ""
    refusals: str = ""
    dense_error: float | None = None
    gates_act: bool | None = None
    masks_equal: bool | None = None
    lowered: int = 0
    kept: str = ""
    lowered_error: float | None = None
    seconds: float = 0.0
    detail: str = ""


# The usual names of a dense FFN's second linear. An independent check of the finder, which knows no names.
_DOWN_NAMES = re.compile(
    r"(.*\.)?(down_proj|fc2|fc_out|fc_down|w2|wo|dense_4h_to_h|lin2|linear2|linear_2|dense2|c_proj|proj_down|mlp\.2|"
    r"(intermediate|ffn|mlp)\.(output|out_proj|dense_out)|(?<!attention\.)output\.dense|ffn_output|output_linear|out_lin)"
)
_NOT_FFN = re.compile(r".*(attn|attention|(?<!shared_)experts|mixer|pooler|embed|patch|projector|vision_adapter).*")


def named_downs(model: nn.Module) -> set[str]:
    """Paths of the linears that usual names make the down projection of a dense FFN."""
    return {
        name
        for name, module in model.named_modules()
        if _DOWN_NAMES.fullmatch(name)
        and not _NOT_FFN.fullmatch(name.rpartition(".")[0])
        and isinstance(getattr(module, "weight", None), Tensor)
        and getattr(module, "weight").dim() == 2  # noqa: B009 -- mypy reads nn.Module attributes as Tensor | Module
    }


def examine(name: str, make: Callable[[], Example]) -> Row:
    """The row of one architecture; never raises: an error is a status and a detail."""
    start = time.perf_counter()
    row = Row(name=name, status="build")
    try:
        example = make()
        before = _run(example)
        row = replace(row, model=type(example.model).__name__, named=len(named_downs(example.model)))
        row = _transformed(row, example)
        row = _compared(row, example, before) if row.status == "ok" else row
    except MemoryError as e:
        row = replace(row, status="stopped", detail=f"{type(e).__name__}: it needs more than a check may take")
    except Exception as e:
        said = str(e).strip().splitlines() or [""]
        where = traceback.extract_tb(e.__traceback__)[-1]
        detail = f"{type(e).__name__}: {said[0][:240]} ({os.path.basename(where.filename)}:{where.lineno})"
        row = replace(row, detail=detail)
    return replace(row, seconds=round(time.perf_counter() - start, 1))


def _run(example: Example) -> Tensor:
    """The first floating output that is no scalar; some models draw random numbers in their forward."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = example.model(**example.inputs)
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    return next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.dim())


def _relative(a: Tensor, b: Tensor) -> float:
    finite = torch.isfinite(b)
    assert torch.equal(finite, torch.isfinite(a)), "one output is infinite where the other is not"
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _counted(texts: Iterable[str]) -> str:
    return "; ".join(f"{n} x {text}" if n > 1 else text for text, n in sorted(Counter(texts).items()))


def _refused(refusals: Iterable[Refusal]) -> str:
    """Reasons by number of places; nodes' numbers and the tracer's own words would differ from run to run."""
    return _counted(
        f"{r.check}: {re.sub(r'_[0-9]+', '', r.reason.partition(' (the whole model')[0])}" for r in refusals
    )


def _transformed(row: Row, example: Example) -> Row:
    """What `ltepass.transform` does, keeping the job, which knows the graphs."""
    model, expected = example.model, named_downs(example.model)
    config = LTEConfig(group_size=GROUP_SIZE, grouping="random")
    job = TransformJob(model, config, example.traced)
    try:
        run_passes(TRANSFORM, job)
        status = "ok"
    except CaptureError as e:
        return replace(row, status="capture", detail=str(e)[:300], unfound=" ".join(sorted(expected)))
    except NoFFNFoundError:
        status = "transform" if expected else "no dense FFN"
    if status == "ok":
        transformers_hook.attach(model)
    downs = {s.down for s in job.sites}
    return replace(
        row,
        status=status,
        graphs=len(job.captured),
        nodes=sum(len(c.flow.gm.graph.nodes) for c in job.captured),
        sites=len(job.sites),
        kinds=" ".join(sorted({s.kind for s in job.sites})),
        activations=" ".join(sorted({s.activation for s in job.sites})),
        found=len(expected & downs),
        unfound=" ".join(sorted(expected - downs)),
        refusals=_refused(job.refusals),
    )


class _Decisions(TorchDispatchMode):
    """The decision of every lowered op that runs: the op's own mask, by the address of the router's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, list[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.ltepass.routed_ffn.default:
            y, mask, _ = torch.ops.ltepass.routed_ffn_with_mask.default(*args)
            self.masks.setdefault(args[1].data_ptr(), []).append(mask)
            return y
        return func(*args, **(kwargs or {}))


def _hard_in_eager(example: Example) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """Hard mode's output, and each router's decisions by the address of its weight."""
    masks: dict[int, list[Tensor]] = {}

    def note(router: Any, args: Any, logits: Tensor) -> None:
        masks.setdefault(router.weight.data_ptr(), []).append(logits > router.threshold)

    hooks = [r.register_forward_hook(note) for r in routers_of(example.model)]
    try:
        return _run(example), masks
    finally:
        for hook in hooks:
            hook.remove()


def _compared(row: Row, example: Example, before: Tensor) -> Row:
    import ltepass

    model = example.model
    error = _relative(_run(example), before)
    row = replace(row, dense_error=error, status="dense")
    if error > TOLERANCE:
        return row
    for router in routers_of(model):
        router.mode = "hard"
    hard, wanted = _hard_in_eager(example)
    row = replace(row, status="lowered", gates_act=_relative(hard, before) > 1e-4)
    try:
        ltepass.lower(model)
    except LoweringError as e:  # its text has one line for each site
        return replace(row, status="ok", kept=_counted(t.partition(": ")[2] for t in str(e).splitlines()[1:]))
    with _Decisions() as seen:
        lowered = _run(example)
    lowered_routers = {r.weight.data_ptr() for r in routers_of(model) if r.plan is not None}
    same = seen.masks.keys() == lowered_routers & wanted.keys() and all(
        len(masks) == len(wanted[key]) and all(torch.equal(a, b) for a, b in zip(masks, wanted[key], strict=True))
        for key, masks in seen.masks.items()
    )
    error = _relative(lowered, hard)
    return replace(
        row,
        lowered=sum(r.plan is not None for r in routers_of(model)),
        masks_equal=same,
        lowered_error=error,
        kept=_counted(note.partition(": ")[2] for note in Routed.of(model, "the census").state.notes),
        status="masks" if not same else "lowered" if error > TOLERANCE else "ok",
    )
