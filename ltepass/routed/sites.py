"""What find_ffn finds: FFN sites as plain values, small enough to stand in a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.fx import Graph

from ltepass.errors import one_line
from ltepass.old_names import held_by

if not TYPE_CHECKING:  # of ours each name is read where it lies
    __getattr__ = held_by(__name__)


@dataclass(frozen=True, kw_only=True)
class NeuronRows:
    """Where a site's neurons lie in one parameter: neuron i is index `start + i * step` along `dim`."""

    param: str  # full name in the root model
    dim: int
    start: int
    step: int

    def of(self, model: nn.Module, d_ff: int) -> Tensor:
        """The slice as a view of the parameter, neurons first: [d_ff, ...]."""
        return self.take(model.get_parameter(self.param), d_ff)

    def take(self, parameter: Tensor, d_ff: int) -> Tensor:
        moved = parameter.movedim(self.dim, 0)
        indices = self.indices(d_ff)
        return moved[indices.start : indices.stop : indices.step]

    def indices(self, d_ff: int) -> range:
        return range(self.start, self.start + (d_ff - 1) * self.step + 1, self.step)

    def renamed(self, rename: Callable[[str], str]) -> NeuronRows:
        return replace(self, param=rename(self.param))


def find_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name; None where pruning or a parametrisation computes it, or an adapter stands there."""
    path, _, last = name.rpartition(".")
    try:
        return model.get_submodule(path)._parameters.get(last)
    except AttributeError:
        return None


def read_rows(model: nn.Module, site: FFNSite, rows: NeuronRows | None) -> Tensor | None:
    """The neurons' rows of one parameter [d_ff, ...], or None where no parameter of that name holds all of them as
    numbers: an adapter, a shard or quantised weights stand there.
    """
    held = None if rows is None else find_parameter(model, rows.param)
    if rows is None or held is None or held.is_meta or held.dim() <= rows.dim or not is_ordinary(held):
        return None
    return rows.take(held, site.d_ff) if rows.indices(site.d_ff)[-1] < held.shape[rows.dim] else None


@dataclass(frozen=True, kw_only=True)
class FFNSite:
    """One FFN: y = down(act(gate(x)) * up(x)) or y = down(act(up(x))).

    Arguments:
        name: unique; the path of the router is `router`.
        owner: path of the smallest module that contains the region; "" is the root.
        up, gate, down: paths of the modules that hold the linears (gate is None in a plain FFN; up == gate where
            fused).
        kind: "aligned" (a regenerated forward), "inline" (guarded hooks), "graph" (nodes in a GraphModule).
        activation: name in `ltepass.kernels.reference.ACTIVATIONS`, or the ATen op's name where no kernel knows it.
        d_model, d_ff: features of x, and neurons.
        out_width: features of y where they are not as many as x's (`transform(match="mlp")`), else None.
        up_rows, gate_rows, down_rows: where neuron i's weights lie (a row or a column); up_bias, gate_bias likewise.
        down_bias: name of the parameter, or None.
        neurons: every parameter that has one slice per neuron, these and any other (a learned scale).
        group_size: neurons per expert; 0 before grouping.
    Raises: nothing; `from_dict` raises CheckpointError.
    Example:
        >>> site = ltepass.report(model).sites[0]
        >>> site.name, site.activation, site.d_ff, site.n_experts
        ('model.layers.0.mlp', 'silu', 60, 5)
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
    up_rows: NeuronRows
    up_bias: NeuronRows | None
    gate_rows: NeuronRows | None
    gate_bias: NeuronRows | None
    down_rows: NeuronRows
    down_bias: str | None
    neurons: tuple[NeuronRows, ...]
    group_size: int = 0
    nodes: tuple[str, ...] = ()  # kind "graph" only: names of x, hidden units and down in the user's graph
    out_width: int | None = None

    @property
    def n_experts(self) -> int:
        return self.d_ff // self.group_size

    @property
    def d_out(self) -> int:
        return self.out_width or self.d_model

    @property
    def width(self) -> str:
        """As reports show it: d_model, or x's and y's."""
        return str(self.d_model) if self.out_width is None else f"{self.d_model} to {self.out_width}"

    def renamed(self, rename: Callable[[str], str]) -> FFNSite:
        """The same site in a root where every module and parameter has another path."""
        changed: dict[str, Any] = {f: rename(getattr(self, f)) for f in PATHS if getattr(self, f) is not None}
        changed |= {f: getattr(self, f).renamed(rename) for f in ROWS if getattr(self, f) is not None}
        changed["neurons"] = tuple(r.renamed(rename) for r in self.neurons)
        site = replace(self, **changed)
        return replace(site, name=site_name(site, self.number)) if self.name == site_name(self, self.number) else site

    @property
    def number(self) -> str | None:
        """Which of its owner's sites this is, where that has several."""
        number = self.name.removeprefix(self.owner).lstrip("#")
        return number if number.isdecimal() else None

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds of a site."""
        from ltepass.routed.site_json import write_site

        return write_site(self)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> FFNSite:
        """Raises CheckpointError where a field is missing, unknown, of another type or no possible value."""
        from ltepass.routed.site_json import read_site

        return read_site(d)


def site_name(site: FFNSite, number: str | None) -> str:
    """The owner's path; that of down where the root owns it alone; with a number where an owner has several sites."""
    return (site.owner or site.down) if number is None else f"{site.owner}#{number}".lstrip("#")


# Fields of a site that name something of the root.
PATHS = ("name", "owner", "router", "up", "gate", "down", "down_bias")
ROWS = ("up_rows", "up_bias", "gate_rows", "gate_bias", "down_rows")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a candidate was left alone. A value, never an exception.

    Arguments:
        module: path of the candidate's down projection (or the owner).
        node: graph node. check: name of the check that failed. reason: one sentence. nearest: how far the match came.
    Raises: nothing.
    Example:
        >>> model = ltepass.transform(dense, skip="*.0.mlp")
        >>> [(refusal.module, refusal.check, refusal.reason) for refusal in ltepass.report(model).refusals]
        [('model.layers.0.mlp', 'left out', 'skip names it')]
    """

    module: str
    node: str
    check: str
    reason: str
    nearest: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, one_line(getattr(self, f.name)))


@dataclass
class LTEState:
    """Kept on the transformed root model as `model._lte`: what was found, what was done, with which settings."""

    config: dict[str, Any]
    sites: list[FFNSite]
    refusals: list[Refusal]
    grouping: str = "identity"
    weights: str | None = None  # "int8" or "int4" where torchao holds linears' weights as codes
    lowered: str | None = None  # None, "ffn" or "model"
    notes: list[str] = field(default_factory=list)  # what lowering kept masked-dense, and why
    untried: list[str] = field(default_factory=list)  # owners that the self check could not run, and why
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by parameter, before lowering laid it out anew
    narrowed: bool = False  # whether FFNs are narrower than the model's config says
    linears: int = 0  # how many beside the FFNs call an op of ours
    graph: Graph | None = None  # a user's own, while the lowered one stands in its place

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which torch makes without the compiled call of scope "model"."""
        if self.lowered != "model":
            return self.__dict__
        note = 'this is a copy of a compiled model and is not compiled; call ltepass.lower(model, scope="model")'
        return {**self.__dict__, "lowered": None, "notes": [*self.notes, note]}


def is_ordinary(tensor: Tensor) -> bool:
    """No subclass with operations of its own (quantised, distributed); fake tensors stand for ordinary ones."""
    cls = type(tensor)
    return cls is nn.Parameter or cls is Tensor or cls.__module__.startswith("torch._subclasses.")
