"""One FFN with random weights and a decision of exactly the stated sparsity, and everything it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.kernels.reference import ACTIVATIONS, leave_out_small
from ltepass.kernels.routed_ffn import routed_ffn
from ltepass.measure.timing import Contender


@dataclass(frozen=True, kw_only=True)
class Shape:
    """tokens: T; d_model, d_ff, group_size in neurons; gated: gate and up, else up only."""

    tokens: int
    d_model: int
    d_ff: int
    group_size: int = 32
    gated: bool = True
    dtype: torch.dtype = torch.float32
    activation: str = "silu"

    @property
    def n_experts(self) -> int:
        return self.d_ff // self.group_size

    @property
    def weight_bytes(self) -> int:
        return (3 if self.gated else 2) * self.d_ff * self.d_model * self.dtype.itemsize

    @property
    def router_share(self) -> float:
        """r: bytes of the fp32 router over bytes of the FFN's weights."""
        return 4 * self.n_experts * self.d_model / self.weight_bytes


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One copy of an FFN's weights. `down` is neuron-contiguous (as lowering lays it out), `down_rows` row-major."""

    up: Tensor
    gate: Tensor | None
    down: Tensor
    down_rows: Tensor


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Tokens, and a router that gives each of them its own random set of exactly round((1 - s) E) experts."""

    x: Tensor
    router: Tensor
    active: Tensor  # bool [T, E]


def make_weights(shape: Shape, copies: int, seed: int = 0) -> list[Weights]:
    gen = torch.Generator().manual_seed(seed)

    def weight(rows: int, cols: int) -> Tensor:
        w = torch.empty(rows, cols, dtype=shape.dtype)
        return w.uniform_(-1, 1, generator=gen).mul_(cols**-0.5)

    def one() -> Weights:
        up = weight(shape.d_ff, shape.d_model)
        gate = weight(shape.d_ff, shape.d_model) if shape.gated else None
        down = weight(shape.d_ff, shape.d_model).T
        return Weights(up=up, gate=gate, down=down, down_rows=down.contiguous())

    return [one() for _ in range(copies)]


@lru_cache(maxsize=16)
def decide(shape: Shape, sparsity: float, seed: int = 0) -> Decision:
    """The router is the smallest that gives the tokens logits of +-1; there is one while T is well below d_model."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.tokens, shape.d_model, generator=gen).to(shape.dtype)
    n_active = round((1 - sparsity) * shape.n_experts)
    active = torch.rand(shape.tokens, shape.n_experts, generator=gen).argsort(-1) < n_active
    wide = x.double()
    factors = torch.linalg.cholesky(wide @ wide.T)
    router = torch.cholesky_solve(active.double() * 2 - 1, factors).T.mm(wide).float()
    assert torch.equal(x.float() @ router.T > 0, active), "the router does not give the decision it was made for"
    return Decision(x=x, router=router, active=active)


def routed(
    shape: Shape,
    weights: list[Weights],
    sparsity: float,
    *,
    hidden: float = 0.0,
    inputs: float = 0.0,
    row_major: bool = False,
) -> Contender:
    """The op as a lowered module calls it; sparsity 0 has every expert on. Each copy of the weights has a router.

    hidden: share of the active experts' hidden units that a cut leaves out of down. inputs: share of x that a cut
    leaves out of up and gate, which then have a row for each input.
    """
    d = decide(shape, sparsity)
    threshold = torch.tensor(0.0)
    calls: list[tuple[Any, ...]] = []
    for w in weights:
        down = w.down_rows if row_major else w.down
        up, gate = (w.up, w.gate) if not inputs else (_by_input(w.up), None if w.gate is None else _by_input(w.gate))
        call = (d.x, d.router.clone(), None, threshold, up, None, gate, None, down, None, shape.activation)
        input_cut = _between(d.x, inputs) if inputs else None
        cut = _cut(w, d, shape, hidden, input_cut) if hidden else None
        calls.append((*call, cut, input_cut) if hidden or inputs else call)
    return lambda i: routed_ffn(*calls[i % len(calls)])


def _by_input(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def _cut(weights: Weights, decision: Decision, shape: Shape, share: float, input_cut: Tensor | None) -> Tensor:
    """[] fp32: this share of the active experts' hidden units is smaller."""
    act, x = ACTIVATIONS[shape.activation], leave_out_small(decision.x, input_cut)
    h = F.linear(x, weights.up)
    h = act(h) if weights.gate is None else act(F.linear(x, weights.gate)) * h
    return _between(h.unflatten(-1, (shape.n_experts, -1))[decision.active], share)


def _between(values: Tensor, share: float) -> Tensor:
    """[] fp32: this share of the values is smaller. Between two sizes: rounding moves none."""
    sizes = values.abs().float().flatten().sort().values
    at = max(round(share * len(sizes)), 1)
    return torch.mean(sizes[at - 1 : at + 1])


def call_alone() -> Contender:
    """The op on an FFN that is hardly there: what a call costs before it reads weights, with code as cold as theirs."""
    shape = Shape(tokens=1, d_model=64, d_ff=128)
    return routed(shape, make_weights(shape, 1), 0.5)


class Dense(nn.Module):
    """The FFN that everybody has, in nn.Linear's layout."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(weights.up, False), nn.Parameter(weights.down_rows, False)
        self.gate = None if weights.gate is None else nn.Parameter(weights.gate, False)
        self.act = ACTIVATIONS[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.up)
        h = self.act(h) if self.gate is None else self.act(F.linear(x, self.gate)) * h
        return F.linear(h, self.down)


def dense_eager(shape: Shape, weights: list[Weights]) -> Contender:
    x, modules = decide(shape, 0.0).x, [Dense(shape, w) for w in weights]
    return lambda i: modules[i % len(modules)](x)


def dense_compiled(shape: Shape, weights: list[Weights]) -> Contender:
    """Inductor at its best for constant weights: freezing and max_autotune. Two copies: each one is compiled.

    The settings are patched globally: given as `options=`, Dynamo does not see `freezing` and keeps weights as inputs.
    """
    x, fns = decide(shape, 0.0).x, []
    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(freezing=True, max_autotune=True, autotune_num_choices_displayed=0):
        for w in weights[-2:]:
            fns.append(torch.compile(Dense(shape, w).eval()))
            fns[-1](x)
    return lambda i: fns[i % len(fns)](x)


def dense_upcast(shape: Shape, weights: list[Weights]) -> Contender:
    """bf16 weights widened to fp32 a tile at a time, multiplied in fp32: dense at its best where the CPU has no units
    for bf16 and tokens are many."""
    x, act = decide(shape, 0.0).x.float(), ACTIVATIONS[shape.activation]

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(x, tile.float()) for tile in weight.split(1024)], -1)

    def call(i: int) -> Tensor:
        w = weights[i % len(weights)]
        h = linear(x, w.up)
        h = act(h) if w.gate is None else act(linear(x, w.gate)) * h
        return linear(h, w.down_rows).to(shape.dtype)

    return call


def index_select(shape: Shape, weights: list[Weights], sparsity: float) -> Contender:
    """Copy the active rows, then multiply: what a few lines of PyTorch give. One token; the decision costs nothing."""
    d, act = decide(shape, sparsity), ACTIVATIONS[shape.activation]
    neurons = d.active[0].repeat_interleave(shape.group_size).nonzero().flatten()

    def call(i: int) -> Tensor:
        w = weights[i % len(weights)]
        h = F.linear(d.x, w.up.index_select(0, neurons))
        h = act(h) if w.gate is None else act(F.linear(d.x, w.gate.index_select(0, neurons))) * h
        return h @ w.down.T.index_select(0, neurons)

    return call


def gate_first(shape: Shape, weights: list[Weights], sparsity: float) -> Contender:
    """CATS: the whole gate decides (its largest |activation|), then up and down of those neurons only. One token."""
    d, act = decide(shape, sparsity), ACTIVATIONS[shape.activation]
    n_active = round((1 - sparsity) * shape.d_ff)

    def call(i: int) -> Tensor:
        w = weights[i % len(weights)]
        assert w.gate is not None
        a = act(F.linear(d.x, w.gate))
        neurons = a[0].abs().topk(n_active, sorted=False).indices
        h = a[:, neurons] * F.linear(d.x, w.up.index_select(0, neurons))
        return h @ w.down.T.index_select(0, neurons)

    return call


Turned = tuple[Tensor, Tensor | None, Tensor]


def turned_weights(weights: Sequence[Weights]) -> list[Turned]:
    """up, gate and down with a row for each input, which is what TEAL's kernels read."""
    return [(w.up.T.contiguous(), None if w.gate is None else w.gate.T.contiguous(), w.down.T) for w in weights[:2]]


def single_neurons(shape: Shape, turned: Sequence[Turned], sparsity: float) -> Contender:
    """TEAL: an unstructured mask on the input of each linear (largest |value|), read from transposed weights.

    One token: h = sum over kept j of x_j up[:, j], and the same for down, whose rows are neurons already.
    """
    d, act = decide(shape, sparsity), ACTIVATIONS[shape.activation]

    def kept(v: Tensor, matrix: Tensor) -> Tensor:
        index = v[0].abs().topk(round((1 - sparsity) * v.shape[1]), sorted=False).indices
        return F.embedding_bag(index[None], matrix, mode="sum", per_sample_weights=v[:, index])

    def call(i: int) -> Tensor:
        up, gate, down = turned[i % len(turned)]
        h = kept(d.x, up)
        h = act(h) if gate is None else act(kept(d.x, gate)) * h
        return kept(h, down)

    return call
