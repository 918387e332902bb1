"""The census behind `ltepass coverage`: what transform does to every architecture, each checked in its own process.

A row says what was captured, found and refused, and whether the gated model still computes the same: dense mode against
the original, and the lowered model against hard mode in eager, the decisions first and then the values.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ltepass.sites import require_state

TIMEOUT_S = 180.0
MEMORY_BYTES = 8 << 30  # address space of one check; torch alone maps about 2 GB
DENSE_TOLERANCE = 1e-5  # relative, fp32


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture.

    status: "ok"; "no dense FFN"; or the step that failed: "build", "capture", "transform", "dense", "masks", "lowered".
    named: dense down projections that go by a usual name; found: those of them that are sites; the difference stands in
        `unfound`. refusals: "check: reason" by number of places. errors are relative to the largest output value.
    """

    name: str
    model: str = ""
    status: str = "ok"
    graphs: str = ""
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
    r"(.*\.)?(down_proj|fc2|fc_out|fc_down|w2|wo|dense_4h_to_h|lin2|linear2|linear_2|c_proj|proj_down|mlp\.2|"
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


def _eager_decisions(model: nn.Module) -> tuple[dict[int, list[Tensor]], list[Any]]:
    """Hooks that note each router's decision in eager hard mode."""
    from ltepass.sites import routers_of

    masks: dict[int, list[Tensor]] = {}

    def note(router: Any, args: Any, logits: Tensor) -> None:
        masks.setdefault(router.weight.data_ptr(), []).append(logits > router.threshold)

    return masks, [r.register_forward_hook(note) for r in routers_of(model)]


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor of a model's output."""
    leaves = torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "items") else output)
    return next(t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())


def _relative(a: Tensor, b: Tensor) -> float:
    finite = torch.isfinite(b)
    assert torch.equal(finite, torch.isfinite(a))
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def examine(name: str, make: Callable[[], tuple[nn.Module, Any, Any]]) -> Row:
    """One row. make: returns (model in eval mode, example inputs for transform or None, kwargs to run it with)."""
    start = time.perf_counter()
    row = Row(name=name, status="build")
    try:
        model, example, inputs = make()
        row = replace(row, model=type(model).__name__, named=len(named_downs(model)))
        for step in (_transformed, _dense_equal, _lowered_equal):
            row = step(row, model, example, inputs)
            if row.status != "ok":
                break
    except Exception as e:
        said = str(e).strip().splitlines() or [""]
        where = traceback.extract_tb(e.__traceback__)[-1]
        detail = f"{type(e).__name__}: {said[0][:240]} ({os.path.basename(where.filename)}:{where.lineno})"
        row = replace(row, detail=detail)
    return replace(row, seconds=round(time.perf_counter() - start, 1))


def _transformed(row: Row, model: nn.Module, example: Any, inputs: Any) -> Row:
    import ltepass
    from ltepass.errors import CaptureError, NoFFNFoundError

    row = replace(row, status="transform")
    with torch.no_grad():
        model._census_before = first_tensor(model(**inputs))  # type: ignore[assignment]
    expected = named_downs(model)
    try:
        ltepass.transform(model, example, ltepass.LTEConfig(group_size=8))
    except CaptureError as e:
        return replace(row, status="capture", detail=str(e)[:300])
    except NoFFNFoundError as e:
        text = str(e).partition("refusals:\n")[2]
        return replace(
            row,
            status="no dense FFN" if not expected else "transform",
            refusals=text.strip(),
            unfound=" ".join(sorted(expected)),
        )
    state = require_state(model, "the census")
    downs = {s.down for s in state.sites}
    counts = Counter(f"{r.check}: {r.reason}" for r in state.refusals)
    return replace(
        row,
        status="ok",
        sites=len(state.sites),
        kinds=" ".join(sorted({s.kind for s in state.sites})),
        activations=" ".join(sorted({s.activation for s in state.sites})),
        found=len(expected & downs),
        unfound=" ".join(sorted(expected - downs)),
        refusals="; ".join(f"{n} x {text}" if n > 1 else text for text, n in counts.items()),
    )


def _dense_equal(row: Row, model: nn.Module, example: Any, inputs: Any) -> Row:
    before: Tensor = model.__dict__.pop("_census_before")
    with torch.no_grad():
        error = _relative(first_tensor(model(**inputs)), before)
    model._census_dense = before  # type: ignore[assignment]
    return replace(row, dense_error=error, status="ok" if error <= DENSE_TOLERANCE else "dense")


def _lowered_equal(row: Row, model: nn.Module, example: Any, inputs: Any) -> Row:
    import ltepass
    from ltepass.sites import routers_of

    dense: Tensor = model.__dict__.pop("_census_dense")
    for router in routers_of(model):
        router.mode = "hard"
    wanted, hooks = _eager_decisions(model)
    with torch.no_grad():
        hard = first_tensor(model(**inputs))
    for hook in hooks:
        hook.remove()
    row = replace(row, status="lowered", gates_act=len(wanted) == row.sites and _relative(hard, dense) > 1e-4)
    try:
        ltepass.lower(model)
    except ltepass.errors.LoweringError as e:
        return replace(
            row, status="ok", kept="; ".join(dict.fromkeys(line.partition(": ")[2] for line in str(e).splitlines()[1:]))
        )
    state = require_state(model, "the census")
    with torch.no_grad(), _Decisions() as seen:
        lowered = first_tensor(model(**inputs))
    same = all(
        len(masks) == len(wanted[key]) and all(torch.equal(a, b) for a, b in zip(masks, wanted[key], strict=True))
        for key, masks in seen.masks.items()
    )
    error = _relative(lowered, hard)
    kept = Counter(note.partition(": ")[2] for note in state.notes)
    return replace(
        row,
        lowered=len(seen.masks),
        masks_equal=same,
        lowered_error=error,
        kept="; ".join(f"{n} x {text}" if n > 1 else text for text, n in kept.items()),
        status="masks" if not same else "lowered" if error > DENSE_TOLERANCE else "ok",
    )
