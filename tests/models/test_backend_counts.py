"""The compiled model stays one graph, compiles a bounded number of times, and calls the op once a layer and step.

Inductor stands aside here (it would cost minutes and changes none of these counts): what Dynamo hands over is lowered
by the real backend and then run as it is. test_lower.py has the whole way with inductor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import ltepass
from ltepass.routed.routed import routers_of
from tests.models.zoo import Graphs, generate, ids, logits, transformed

LAYERS, NEW = 9, 3  # more layers than Dynamo's limit of 8 on recompiling one function
LENGTHS, BATCHES = (3, 5, 8, 13, 21), (1, 2, 4)
MOST_GRAPHS = 6  # prompts and single tokens, one sequence or more; the cache before and after it is filled


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often compiled graphs ran, and the ops in them."""
    seen: Counter[str] = Counter()

    def stand_in(gm: torch.fx.GraphModule, inputs: list[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
        ops = sum(n.target is torch.ops.ltepass.routed_ffn.default for n in gm.graph.nodes)

        def run(*args: Any) -> Any:
            below = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
            seen.update(graphs=1, ops=ops, below_autograd=below)
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", stand_in)
    yield seen
    torch._dynamo.reset()


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    with Graphs() as graphs:
        yield graphs


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "opt"])
def test_graph_breaks_recompiles_and_op_calls(name: str, calls: Counter[str], graphs: Graphs) -> None:
    model = transformed(name, layers=LAYERS)
    prompts = [ids(batch, length) for length in LENGTHS for batch in BATCHES]
    expected = [generate(model, x, NEW) for x in prompts]
    ltepass.lower(model, scope="model")
    for x, tokens in zip(prompts, expected, strict=True):
        calls.clear()
        assert torch.equal(generate(model, x, NEW), tokens)
        assert calls == {"graphs": NEW, "ops": LAYERS * NEW, "below_autograd": NEW}, tuple(x.shape)
    assert dict(counters["graph_break"]) == {}
    assert set(graphs.seen) == {(LAYERS, LAYERS)}
    assert graphs.reasons == []
    compiled = len(graphs.seen)
    print(f"{name}: {len(prompts)} prompts, {compiled} graphs, 0 breaks, {LAYERS} op calls a step")
    assert compiled <= MOST_GRAPHS
    for x in prompts[::4]:
        generate(model, x, NEW)
    assert len(graphs.seen) == compiled, "a prompt seen before compiles nothing"


def test_a_step_makes_no_tensor_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    as_tensor = torch._as_tensor_fullprec

    def counted(number: float) -> Any:
        made.append(number)
        return as_tensor(number)

    monkeypatch.setattr(torch, "_as_tensor_fullprec", counted)
    model, x = transformed("llama"), ids(2, 5)
    expected = logits(model, x)
    compiled = torch.compile(model, backend="lte", dynamic=True)
    torch.testing.assert_close(logits(compiled, x), expected)
    assert made, "dynamic=True alone makes one of every norm's eps"
    torch._dynamo.reset()
    made.clear()
    torch.testing.assert_close(logits(ltepass.lower(model, scope="model"), x), expected)
    assert made == []


def test_autograd_is_passed_by_only_where_nothing_asks_for_a_gradient(calls: Counter[str]) -> None:
    model, x = transformed("llama").requires_grad_(False), ids(2, 5)
    ltepass.lower(model, scope="model")
    logits(model, x)
    assert (calls["graphs"], calls["below_autograd"]) == (1, 1)
    model(x)
    assert (calls["graphs"], calls["below_autograd"]) == (2, 1)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])  # gpt2's activation has math.pi, dynamic as any number
def test_fullgraph_stays_fullgraph_over_lengths_and_batches(name: str, graphs: Graphs) -> None:
    model = transformed(name)
    compiled = torch.compile(model, backend="lte", fullgraph=True, dynamic=True)
    for batch in BATCHES:
        for length in LENGTHS:
            x = ids(batch, length)
            torch.testing.assert_close(logits(compiled, x), logits(model, x), rtol=1e-5, atol=1e-5)
    assert len(graphs.seen) <= 2, "batch 1 is a graph of its own"
    assert set(graphs.seen) == {(2, 2)}


class _Scaled(nn.Module):
    """ReLU times a number, which a compiler may keep symbolic."""

    factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * self.factor


def test_a_number_that_made_an_activation_known_is_guarded(graphs: Graphs) -> None:
    scaled, x = _Scaled(), torch.randn(2, 3, 8)
    model = nn.Sequential(nn.Linear(8, 24), scaled, nn.Linear(24, 8)).eval()
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    ltepass.set_mode(model, "hard")
    compiled = torch.compile(model, backend="lte", fullgraph=True, dynamic=True)
    for factor, count in ((1.0, 1), (1.0, 1), (3.5, 2), (1.0, 2)):
        scaled.factor = factor
        torch.testing.assert_close(logits(compiled, x), logits(model, x))
        assert len(graphs.seen) == count
    assert graphs.seen == [(1, 1), (1, 0)]


class _Two(nn.Module):
    """An FFN that the op names, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.known = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8))
        self.unknown = nn.Sequential(nn.Linear(8, 24), nn.Mish(), nn.Linear(24, 8))

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.known(x)
        return x + self.unknown(x)


def test_what_the_backend_keeps_masked_dense_reaches_the_report(graphs: Graphs) -> None:
    model, x = _Two().eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    for router in routers_of(model):
        router.mode = "hard"
    expected = logits(model, x)
    ltepass.lower(model, scope="model")
    torch.testing.assert_close(logits(model, x), expected)
    assert graphs.seen == [(2, 1)]
    (note,) = ltepass.report(model).notes
    assert note == "unknown: kept masked-dense: no kernel knows its activation custom(mish)"
    ltepass.unlower(model)
    assert ltepass.report(model).notes == []


class _Wide(nn.Module):
    """Beside these, one with its activation in another dtype: the op would compute it in the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.up, self.down = _Two(), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.two(x) + self.down(torch.relu(self.up(x).double()).float())


def test_what_only_the_compiled_graph_shows_reaches_the_report_as_well() -> None:
    model, x = _Wide().eval(), torch.randn(2, 3, 8)
    ltepass.transform(model, x, ltepass.LTEConfig(group_size=4))
    for router in routers_of(model):
        router.mode = "hard"
    expected = logits(model, x)
    ltepass.lower(model, scope="model")
    assert [n.partition(":")[0] for n in ltepass.report(model).notes] == ["two.unknown"]
    torch.testing.assert_close(logits(model, x), expected)
    notes = ltepass.report(model).notes
    assert notes[1:] == ["down: kept masked-dense: a cast inside the region"]
    assert notes[1] in str(ltepass.report(model))
