"""Random module trees with planted FFNs of every form among distractors, and one graph in another order and names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer
from torch.nn import functional as F  # noqa: N812

from ltepass.passes.graph.captured import Captured
from ltepass.passes.graph.leaves_and_linears import Flow
from tests.passes import ffn_forms as forms
from tests.passes import traps

D = forms.D


def examples(n: int) -> settings:
    """n examples in CI, more in proportion under the profile `deep`."""
    return settings(max_examples=n * settings().max_examples // 100)


ACTS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, F.gelu, F.relu, torch.tanh, lambda x: F.relu(x).square())

# name -> (make(activation, d_ff), path of the down projection)
PLANTED: dict[str, tuple[Callable[[Any, int], nn.Module], str]] = {
    "plain": (lambda act, h: forms.Plain(act, h=h), "down"),
    "plain without biases": (lambda act, h: forms.Plain(act, bias=False, h=h), "down"),
    "gated": (lambda act, h: forms.Gated(act, h=h), "w2"),
    "gated with biases": (lambda act, h: forms.Gated(act, bias=True, h=h), "w2"),
    "fused, gate first": (lambda act, h: forms.FusedHalves(h=h), "down"),
    "fused, up first": (lambda act, h: forms.FusedHalves(gate_first=False, h=h), "down"),
    "interleaved": (lambda act, h: forms.Interleaved(h=h), "down"),
    "interleaved, clamped": (lambda act, h: forms.Interleaved(0.4, h=h), "down"),
    "unbound": (lambda act, h: forms.Unbound(h=h), "down"),
    "Conv1D": (lambda act, h: forms.Conv(), "c_proj"),
    "scaled": (lambda act, h: forms.Scaled(), "down"),
    "scaled tokens": (lambda act, h: forms.Scaled(per_token=True), "down"),
    "inline": (lambda act, h: forms.Inline(), "fc2"),
    "parallel": (lambda act, h: forms.Inline(parallel=True), "fc2"),
    "split": (lambda act, h: forms.Split(), "output.dense"),
}
DISTRACTORS: dict[str, Callable[[], nn.Module]] = {
    "attention": traps.Attention,
    "gated attention": lambda: traps.Attention(gated=True),
    "sdpa": traps.SDPA,
    "gated sdpa": lambda: traps.SDPA(gated=True),
    "linear attention": traps.LinearAttention,
    "shifted gate": traps.ShiftedGate,
    "low rank": traps.LowRank,
    "scaled low rank": lambda: traps.LowRank(0.5),
    "two branches": traps.TwoBranches,
    "squeeze and excite": traps.SqueezeExcite,
    "excitation": traps.TokenwiseExcite,
    "token mixing": traps.Mixer,
    "norm inside": lambda: traps.NormInside(nn.LayerNorm(forms.H)),
    "statistic inside": traps.StatisticInside,
    "top-k": traps.TopKInside,
    "cross gated": traps.CrossGated,
    "watched": traps.Watched,
    "reversed": traps.Reversed,
    "linear": lambda: nn.Linear(D, D),
    "norm": lambda: nn.LayerNorm(D),
}


@dataclass(frozen=True)
class Leaf:
    """kind: a key of PLANTED or DISTRACTORS. norm, residual: x + child(norm(x)), or parts of it."""

    kind: str
    activation: int
    d_ff: int
    norm: bool
    residual: bool


leaves = st.builds(
    Leaf,
    kind=st.one_of(st.sampled_from(sorted(PLANTED)), st.sampled_from(sorted(DISTRACTORS))),
    activation=st.integers(0, len(ACTS) - 1),
    d_ff=st.sampled_from([2, 7, D, 24, 33]),
    norm=st.booleans(),
    residual=st.booleans(),
)
trees = st.lists(
    st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3).map(tuple), max_leaves=4),
    min_size=1,
    max_size=3,
).map(tuple)

NAMES = ("q_proj", "attn", "down_proj", "fc2", "router", "experts", "mlp", "layers", "x", "gate_up")


class Branch(nn.Module):
    """Children one after the other, under names that mean nothing."""

    def __init__(self, tree: Sequence[Any], names: Iterator[str], planted: list[nn.Parameter]) -> None:
        super().__init__()
        self.steps: list[tuple[str, str, bool]] = []
        for i, item in enumerate(tree):
            name, norm, residual = f"{next(names)}_{i}", "", True
            if isinstance(item, Leaf):
                child = _made(item, planted)
                norm, residual = f"norm_{i}" if item.norm else "", item.residual
            else:
                child = Branch(item, names, planted)
            self.add_module(name, child)
            if norm:
                self.add_module(norm, nn.LayerNorm(D))
            self.steps.append((name, norm, residual))

    def forward(self, x: Tensor) -> Tensor:
        for name, norm, residual in self.steps:
            y = self.get_submodule(name)(self.get_submodule(norm)(x) if norm else x)
            x = x + y if residual else y
        return x


def _made(leaf: Leaf, planted: list[nn.Parameter]) -> nn.Module:
    if leaf.kind not in PLANTED:
        return DISTRACTORS[leaf.kind]()
    make, down = PLANTED[leaf.kind]
    module = make(ACTS[leaf.activation], leaf.d_ff)
    planted.append(module.get_parameter(f"{down}.weight"))
    return module


def build(tree: Sequence[Any], seed: int = 0) -> tuple[nn.Module, set[int]]:
    """(the tree, addresses of the planted FFNs' down weights). seed: of names and weights."""
    torch.manual_seed(seed)
    rng, planted = random.Random(seed), list[nn.Parameter]()
    names = iter(lambda: rng.choice(NAMES), None)
    return Branch(tree, names, planted).eval(), {p.data_ptr() for p in planted}


def graph_of(model: nn.Module) -> GraphModule:
    """As a user would bring it: linears and norms are modules of the graph."""
    return torch.fx.symbolic_trace(model)


class _Deep(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def flat_graph_of(model: nn.Module) -> GraphModule:
    """All the way down to functions and parameters."""
    return GraphModule(model, _Deep().trace(model))


class _Recorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


@torch.no_grad()
def captured(gm: GraphModule, x: Tensor) -> Captured:
    """What capture makes of a flat graph, with real values in the place of fake ones: they cost a tenth."""
    _Recorder(gm).run(x)
    leaves = {n: str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    return Captured(flow=Flow(gm, leaves))


def reordered(gm: GraphModule, seed: int) -> GraphModule:
    """The same graph in a random order that respects its edges, its nodes under random names."""
    rng, graph, env = random.Random(seed), Graph(), dict[Node, Node]()
    todo = list(gm.graph.nodes)
    while todo:
        ready = [n for n in todo if all(a in env for a in n.all_input_nodes) and n.op != "output"]
        first = [n for n in ready if n.op == "placeholder"]
        node = (first or [rng.choice(ready)] if ready else todo)[0]
        todo.remove(node)
        env[node] = graph.node_copy(node, lambda n: env[n])
        if node.op not in ("placeholder", "output"):
            env[node]._rename(f"n{rng.randrange(10**6)}")
    return GraphModule(gm, graph)
