"""One contract and one runner for transform's passes and the backend's."""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace

import ltepass
from ltepass.errors import ConfigError
from ltepass.passes import BACKEND, EXPORT, TRANSFORM
from ltepass.passes.capture.trace_owner import OwnerGraphs, trace_owner
from ltepass.passes.find import region_to_site
from ltepass.passes.graph.pipeline import NAMES, GraphJob, Pass, Tier, TransformJob, run_passes
from ltepass.passes.insert import insert_routers


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adds:
    """Doubles what the graph returns; breaks: leaves a graph that no lint passes; fails: raises afterwards."""

    name: str = "adds"
    tier: Tier = "exact"
    skippable: bool = False
    breaks: bool = False
    fails: bool = False

    def __call__(self, job: GraphJob) -> str:
        graph = job.gm.graph
        (output,) = [n for n in graph.nodes if n.op == "output"]
        result = output.args[0]
        assert isinstance(result, Node)
        with graph.inserting_before(result if self.breaks else output):
            output.args = (graph.call_function(torch.add, (result, result)),)
        if self.fails:
            raise KeyboardInterrupt
        return "one node"


def model() -> Any:
    return nn.Sequential(FFN(), FFN()).eval()


def compiled(hard: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """What a compiled model gives, and how many sparse ops each of its graphs holds after the backend's passes."""
    torch._dynamo.reset()
    seen = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        run_passes(BACKEND, GraphJob(gm))
        seen.append(sum(n.target is torch.ops.ltepass.routed_ffn.default for n in gm.graph.nodes))
        return gm.forward

    with torch.no_grad():
        return torch.compile(hard, backend=backend, fullgraph=True)(x), seen


def test_every_pass_keeps_the_contract() -> None:
    passes: tuple[Pass[Any], ...] = (*TRANSFORM, *BACKEND, *EXPORT)
    assert tuple(dict.fromkeys(p.name for p in passes)) == NAMES
    for p in passes:
        name = p.name
        assert dataclasses.is_dataclass(p)
        assert vars(type(p))["__dataclass_params__"].frozen
        assert all(f.kw_only for f in dataclasses.fields(p))
        text = sys.modules[type(p).__module__].__doc__ or ""
        assert text.startswith(f"{name}: "), "its file is named for it"
        assert "    " in text, "the graph before and after"


def test_the_runner_counts_what_came_and_went(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ltepass"):
        run_passes((Adds(), Adds()), GraphJob(symbolic_trace(FFN())))
    said = [record.getMessage().partition(" (")[0] for record in caplog.records]
    assert said == ["adds: one node; add: 0 -> 1", "adds: one node; add: 1 -> 2"]


@pytest.mark.parametrize("bad", [Adds(breaks=True), Adds(fails=True)], ids=["breaks", "fails"])
def test_what_fails_is_named_and_undone(bad: Adds) -> None:
    gm = symbolic_trace(FFN())
    before = [(n.op, str(n.target)) for n in gm.graph.nodes]
    with pytest.raises((RuntimeError, KeyboardInterrupt)) as error:
        run_passes((Adds(), bad), GraphJob(gm))
    assert error.value.__notes__ == ["(in pass 'adds')"]
    assert [(n.op, str(n.target)) for n in gm.graph.nodes] == before
    gm.graph.lint()
    gm.recompile()
    x = torch.randn(3, 6)
    assert torch.equal(gm(x), symbolic_trace(gm)(x))


def test_grouping_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTEPASS_SKIP", "group_neurons")
    plain = model()
    up = plain[0].up.weight.detach().clone()
    ltepass.transform(plain, torch.randn(2, 6), ltepass.LTEConfig(group_size=4, grouping="random"))
    assert torch.equal(plain[0].up.weight, up)


def test_lowering_in_a_graph_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6)
    hard = ltepass.transform(model(), x, ltepass.LTEConfig(group_size=4, grouping="identity"))
    ltepass.set_mode(hard, "hard")
    y, seen = compiled(hard, x)
    monkeypatch.setenv("LTEPASS_SKIP", " lower_routed_ffn ,")
    plain, left = compiled(hard, x)
    assert (seen, left) == ([2], [0])
    torch.testing.assert_close(plain, y)


@pytest.mark.parametrize("name", ["find_ffn", "capture", "lower"])
def test_a_needed_or_unknown_pass_is_not_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTEPASS_SKIP", name)
    with pytest.raises(ConfigError, match=f"LTEPASS_SKIP names '{name}'"):
        ltepass.transform(model(), torch.randn(2, 6))


class Two(nn.Module):
    """One owner of two sites: their linears hang on it itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.up2, self.down2 = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Any:
        x = self.down(torch.relu(self.up(x)))
        return self.down2(torch.relu(self.up2(x)))


def test_an_owner_is_traced_once_and_its_gates_go_into_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    both, traced = nn.Sequential(Two(), FFN()).eval(), []

    def noted(own: nn.Module) -> OwnerGraphs | None:
        traced.append(own)
        return trace_owner(own)

    for module in (region_to_site, insert_routers):
        monkeypatch.setattr(module, "trace_owner", noted)
    x = torch.randn(2, 6)
    config = ltepass.LTEConfig(group_size=4, grouping="identity")
    job = run_passes(TRANSFORM, TransformJob(both, config, x))
    assert [site.kind for site in job.sites] == ["aligned"] * 3
    assert traced == [both[0], both[1]]
    targets = [str(n.target) for graphs in job.owner_graphs.values() if graphs for g in graphs for n in g.nodes]
    assert targets.count("down") == 4
    assert not any("router" in target or "gate" in target for target in targets)
