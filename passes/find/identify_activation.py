"""A region run on sample values: which function of its streams it computes, named when a kernel knows it.

In fp64, with values far out as well, so that clamps and thresholds show. Casts, dropout and gates are left out. What is
affine in all streams together has no activation at all: a low-rank pair of linears, whatever is written between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument, map_arg

from ltepass.passes.find.match_types import MissError, Piece
from ltepass.passes.graph.leaves_and_linears import Flow, Linear
from ltepass.passes.graph.node_kinds import is_plain_tensor, is_pointwise, numel, op_name, shape, tensor_inputs
from ltepass.passes.graph.run_node import run

_SKIPPED = frozenset("to dropout float half bfloat16 double type_as gate alias detach contiguous clone".split())
ANOTHER = "another function"
ENOUGH = 256  # values of each piece; at a single one far out, gelu and silu are the same number


@dataclass(frozen=True)
class Known:
    """What a region computes. order: which pieces are (gate, up) or (up,); activation: None where it is affine."""

    order: tuple[int, ...]
    activation: str | None


def identify(
    flow: Flow, down: Linear, pieces: list[Piece], inner: Sequence[Node], leaves: Sequence[Node], scales: Sequence[Node]
) -> tuple[list[Piece], str]:
    """([gate, up] or [up], activation): a name in kernels.reference.ACTIVATIONS, or "custom(<ops>)".

    Raises MissError where the region is affine: no activation between the linears.
    """
    probe = _Probe(flow, down, pieces, inner, leaves, scales)
    key = probe.signature()  # the layers of a model are alike: one of them is run
    if key not in flow.identified:
        flow.identified[key] = _run(probe, leaves, scales)
    known: Known = flow.identified[key]
    if known.activation is None:
        raise MissError(down.node, "activation", "two linears with no activation between them: a low-rank pair")
    return [pieces[i] for i in known.order], known.activation


def _run(probe: _Probe, leaves: Sequence[Node], scales: Sequence[Node]) -> Known:
    names = [op_name(n) or "" for n in probe.inner if is_pointwise(n)]
    custom = "custom(" + ",".join(dict.fromkeys(n for n in names if n not in _SKIPPED)) + ")"
    order = tuple(range(len(probe.pieces)))
    rounds = [[probe.sample(i) for i in order] for _ in range(probe.rounds)]
    values = [h for samples in rounds if (h := probe(samples)) is not None]
    if not values:  # an operation that takes no made-up values: nothing is known but the names of its operations
        return Known(order[:2], custom)

    def affine(which: Sequence[int]) -> bool:
        return all(probe.affine(samples, which) for samples in rounds)

    if affine(order):
        return Known(order, None)
    if len(order) > 2:
        return Known(order[:2], custom)
    if len(order) == 2 and not affine([1]) and affine([0]):
        order = (1, 0)
    if scales or any(shape(leaf) and leaf not in probe.known for leaf in leaves):
        return Known(order, custom)
    samples = [torch.cat(of_piece) for of_piece in zip(*rounds, strict=True)]
    return _named(order, samples, torch.cat(values)) or Known(order, custom)


def _named(order: tuple[int, ...], samples: list[Tensor], h: Tensor) -> Known | None:
    """The first activation that a kernel knows and that gives these hidden units, with its order of pieces."""
    from ltepass.kernels.reference import ACTIVATIONS

    for turned in dict.fromkeys((order, order[::-1])):
        for name, act in ACTIVATIONS.items():
            expected = act(samples[turned[0]]) * (samples[turned[1]] if len(turned) == 2 else 1.0)
            if torch.allclose(h, expected, rtol=1e-6, atol=1e-6):
                return Known(turned, name)
    return None


class _Probe:
    """Evaluates the region's hidden units [tokens, d_ff] at sample values of its pieces."""

    def __init__(
        self,
        flow: Flow,
        down: Linear,
        pieces: Sequence[Piece],
        inner: Sequence[Node],
        leaves: Sequence[Node],
        scales: Sequence[Node],
    ) -> None:
        self.down, self.pieces, self.inner = down, pieces, inner
        self.generator = torch.Generator().manual_seed(0)
        self.known = {n: flow.constants[flow.leaves[n]] for n in leaves if flow.leaves[n] in flow.constants}
        self.fixed = {n: self.known[n] if n in self.known else self._uniform(shape(n), 0.25, 0.75) for n in leaves}
        self.fixed |= {n: self._uniform(shape(n), 0.5, 1.5) for n in scales}

    def signature(self) -> str:
        """Equal for two regions that compute the same: roles in place of names, and all that the values depend on."""
        roles: dict[Node, str] = {leaf: f"leaf {i}" for i, leaf in enumerate(self.fixed)}
        streams = list(dict.fromkeys(piece.linear.node for piece in self.pieces))
        roles |= {node: f"stream {i}" for i, node in enumerate(streams)}
        roles |= {node: f"inner {i}" for i, node in enumerate(self.inner)}
        where = [(roles[p.linear.node], p.rows.start, p.rows.step) for p in self.pieces]
        shapes = [shape(n) if is_plain_tensor(n) else () for n in roles]
        literals = [(roles[n], v.tolist()) for n, v in self.known.items()]
        steps = [(str(n.target), map_arg((n.args, n.kwargs), lambda a: roles.get(a, a.name))) for n in self.inner]
        return repr((where, shapes, literals, steps, roles.get(self.down.x)))

    def _uniform(self, size: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.empty(size, dtype=torch.float64).uniform_(low, high, generator=self.generator)

    @property
    def rounds(self) -> int:
        """How many samples tell one function from another: few example tokens of a narrow FFN hold few values."""
        return max(1, -(-ENOUGH // (self._tokens(0) * self.down.in_width)))

    def _tokens(self, i: int) -> int:
        node = self.pieces[i].linear.node
        return numel(node) // shape(node)[-1]

    def sample(self, i: int) -> Tensor:
        """Values of piece i: [tokens, d_ff], most within 6, some as far out as 6e4."""
        sample = self._uniform((self._tokens(i), self.down.in_width), -6.0, 6.0)
        reach = torch.randint(-4, 5, sample.shape, generator=self.generator).clamp_min(0)
        return sample * 10.0**reach

    def __call__(self, samples: Sequence[Tensor]) -> Tensor | None:
        """h [tokens, d_ff] in fp64; None where the region cannot be run on these values."""
        env: dict[Node, Argument] = dict(self.fixed)
        for piece, sample in zip(self.pieces, samples, strict=True):
            node, rows = piece.linear.node, piece.rows
            stream = env.setdefault(node, torch.zeros(shape(node), dtype=torch.float64))
            assert isinstance(stream, Tensor)
            flat = stream.view(-1, stream.shape[-1])
            flat[:, rows.start + rows.step * torch.arange(self.down.in_width)] = sample
        for node in self.inner:
            try:
                env[node] = env[tensor_inputs(node)[0]] if op_name(node) in _SKIPPED else run(node, env)
            except (RuntimeError, TypeError, NotImplementedError, ValueError, AssertionError):
                return None
        h = env[self.down.x]
        return h.reshape(-1, h.shape[-1]) if isinstance(h, Tensor) else None

    def affine(self, samples: Sequence[Tensor], which: Sequence[int]) -> bool:
        """Whether h is affine in the pieces `which` together, the others held at `samples`."""

        def at(factor: float, shift: float) -> Tensor:
            moved = [s * factor + shift if i in which else s for i, s in enumerate(samples)]
            h = self(moved)
            assert h is not None, "these values have the dtype and shape of the first ones"
            return h

        here, negative, zero, shifted = at(1.0, 0.0), at(-1.0, 0.0), at(0.0, 0.0), at(1.0, 3.0)
        odd = torch.allclose(here + negative, 2 * zero, rtol=1e-9, atol=1e-9)
        return odd and torch.allclose(shifted - here, at(0.0, 3.0) - zero, rtol=1e-6, atol=1e-4)


def activation_of(function: Callable[[Tensor], object]) -> str | None:
    """Which activation a function is, or ANOTHER; None for what passes its input on (dropout)."""
    from ltepass.kernels.reference import ACTIVATIONS

    sample = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64, device="cpu")
    try:
        value = function(sample)
    except Exception:  # it takes something else
        return None
    if not isinstance(value, Tensor) or value.shape != sample.shape or torch.equal(value.double(), sample):
        return None
    known = ((name, act(sample)) for name, act in ACTIVATIONS.items() if name != "identity")
    return next((name for name, want in known if torch.allclose(value.double(), want, rtol=1e-6, atol=1e-6)), ANOTHER)
