"""What find_ffn finds: FFN sites as plain values, small enough to stand in a checkpoint's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True, kw_only=True)
class NeuronRows:
    """Where a site's neurons lie in one parameter: neuron i is index `start + i * step` along `dim`."""

    param: str  # full name in the root model
    dim: int
    start: int
    step: int


@dataclass(frozen=True, kw_only=True)
class FFNSite:
    """One FFN: y = down(act(gate(x)) * up(x)) or y = down(act(up(x))).

    name: unique; the path of the router is `router`.
    owner: path of the smallest module that contains the region; "" is the root.
    up, gate, down: paths of the modules that hold the linears (gate is None in a plain FFN; up == gate where fused).
    kind: "aligned" (a regenerated forward), "inline" (guarded hooks), "graph" (nodes in a GraphModule).
    activation: name in `ltepass.kernels.reference.ACTIVATIONS`, or the ATen op's name where no kernel knows it.
    neurons: every parameter that has one slice per neuron.
    group_size: neurons per expert; 0 before grouping.
    """

    name: str
    owner: str
    kind: Literal["aligned", "inline", "graph"]
    router: str
    up: str
    gate: str | None
    down: str
    activation: str
    d_model: int
    d_ff: int
    neurons: tuple[NeuronRows, ...]
    group_size: int = 0
    also: tuple[str, ...] = ()  # names of further call sites that share this site's parameters

    @property
    def n_experts(self) -> int:
        return self.d_ff // self.group_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> FFNSite:
        rows = tuple(NeuronRows(**r) for r in d["neurons"])
        return FFNSite(**{**d, "neurons": rows, "also": tuple(d.get("also", ()))})


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a candidate was left alone. A value, never an exception.

    module: path of the candidate's down projection (or the owner); node: graph node; check: name of the check that
    failed; reason: one sentence; nearest: how far the match came.
    """

    module: str
    node: str
    check: str
    reason: str
    nearest: str = ""


@dataclass
class LTEState:
    """Kept on the transformed root model as `model._lte`: what was found, what was done, with which settings."""

    config: dict[str, Any]
    sites: list[FFNSite]
    refusals: list[Refusal]
    grouping: str = "identity"
    lowered: str | None = None  # None, "ffn" or "model"
    notes: list[str] = field(default_factory=list)  # what lowering kept masked-dense, and why


def state_of(model: nn.Module) -> LTEState | None:
    """The state that `transform` left on this model, or None."""
    return getattr(model, "_lte", None)
