"""lower_linears: random graphs, each linear spelt as code spells it; and what the pass leaves as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everybody uses

from ltepass.passes import BACKEND
from ltepass.passes.graph.pipeline import GraphJob, run_passes

SPELLINGS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "added": lambda x, w, b: x @ w.t() if b is None else b + x @ w.t(),
    "addmm": lambda x, w, b: x.mm(w.t()) if b is None else torch.addmm(b, x, w.t()),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Chain(nn.Module):
    """Linears one after another; two read the same input, the last reads the first one's weight again."""

    def __init__(self, widths: list[int], spellings: list[str], bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.spellings = spellings
        sizes = list(zip(widths[1:], widths, strict=False))
        self.weights = nn.ParameterList(torch.randn(o, i, dtype=dtype) / i**0.5 for o, i in sizes)
        self.biases = nn.ParameterList(torch.randn(o, dtype=dtype) for o, _ in sizes) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for k, (w, how) in enumerate(zip(self.weights, self.spellings, strict=True)):
            x = torch.tanh(SPELLINGS[how](x, w, None if self.biases is None else self.biases[k]))
        return x.sum() + F.linear(first, self.weights[0]).sum(-1)


def lowered(model: nn.Module, *inputs: Any) -> tuple[Tensor, GraphJob, torch.fx.GraphModule]:
    """What the passes make of Dynamo's graph computes, the job, and the graph."""
    jobs = []

    def backend(gm: torch.fx.GraphModule, _: object) -> Any:
        jobs.append(run_passes(BACKEND, GraphJob(gm)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    (job,) = jobs
    return y, job, job.gm


def ops(gm: torch.fx.GraphModule) -> int:
    return sum(n.target is torch.ops.ltepass.linear.default for n in gm.graph.nodes)


# Each example is a compilation: shrinking one that fails would take minutes.
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    widths=st.lists(st.sampled_from([1, 3, 8, 33, 64]), min_size=2, max_size=5),
    spelling=st.lists(st.sampled_from(sorted(SPELLINGS)), min_size=4, max_size=4),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 2, 32, 45]),
)
def test_every_spelling_becomes_the_op_and_computes_the_same(
    widths: list[int], spelling: list[str], bias: bool, dtype: torch.dtype, tokens: int
) -> None:
    torch.manual_seed(0)
    model = Chain(widths, spelling[: len(widths) - 1], bias, dtype)
    x = torch.randn(tokens, widths[0], dtype=dtype)
    y, job, gm = lowered(model, x)
    assert job.linears == ops(gm) == len(widths)
    with torch.no_grad():
        exact = model.double()(x.double())
        own = (model.to(dtype)(x).double() - exact).abs().max()
    scale = exact.abs().max()
    assert (y.double() - exact).abs().max() <= 2 * own + 4 * torch.finfo(dtype).eps * scale


def test_linears_with_nothing_between() -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 7), nn.Linear(7, 3, bias=False))
    y, job, gm = lowered(model, x := torch.randn(2, 4, 8))
    assert job.linears == ops(gm) == 3
    assert torch.allclose(y, model(x), atol=1e-5)


class Left(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cast":
            return F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16))
        if self.how == "cast back":
            return F.linear(x, self.weight.to(torch.bfloat16).to(torch.float32))
        if self.how == "transposed":
            return x @ self.weight
        if self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(x, self.weight)
        if self.how == "broadcast bias":
            return torch.addmm(x, x, self.weight.t())
        return F.linear(x, x)


@pytest.mark.parametrize("how", ["cast", "cast back", "transposed", "autocast", "broadcast bias", "no weight"])
def test_what_is_left_is_untouched(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Left(how), torch.randn(8, 8)
    caplog.set_level("INFO", "ltepass")
    y, job, gm = lowered(model, x)
    assert job.linears == ops(gm) == 0
    assert torch.equal(y, model(x))
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("lower_linears"))
    assert said.startswith("lower_linears: unchanged")
    assert ("1 left: a weight stored [d_in, d_out]" in said) == (how == "transposed")


def test_the_environment_leaves_the_pass_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTEPASS_SKIP", "lower_linears")
    y, job, gm = lowered(model := nn.Linear(8, 4), x := torch.randn(3, 8))
    assert job.linears == ops(gm) == 0
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("trains", [True, False])
def test_backend_leaves_a_graph_that_trains(trains: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Linear(8, 4).requires_grad_(trains), torch.randn(3, 8)
    caplog.set_level("INFO", "ltepass")
    torch._dynamo.reset()
    y = torch.compile(model, backend="lte")(x)
    assert torch.allclose(y, model(x), atol=1e-5)
    said = [r.getMessage().partition(" (")[0] for r in caplog.records if r.getMessage().startswith("lower_linears")]
    assert said == ([] if trains else ["lower_linears: 1 linears lowered"])
