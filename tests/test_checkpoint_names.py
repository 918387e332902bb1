"""Names in a checkpoint: held to one rule before they are written into source, and each written once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph

import ltepass
from ltepass.errors import CheckpointError, SourceNameError
from ltepass.passes.capture.trace_owner import trace_owner
from ltepass.passes.insert.generated_forwards import ForwardCode
from ltepass.routed.sites import FFNSite, NeuronRows
from tests.crafted_checkpoints import CHECKPOINTS
from tests.test_checkpoint_trust import PAYLOADS
from tests.typed import lte_state


def graph_with(target: str) -> Graph:
    graph = Graph()
    graph.output(graph.create_node("call_module", target, (graph.placeholder("x"),)))
    return graph


@pytest.mark.parametrize("target", [*PAYLOADS, "a.class", "a..b", "", "a.__init__", 'a"', "a\\"])
def test_no_name_outside_the_rule_is_written_into_source(target: str) -> None:
    with pytest.raises(SourceNameError, match="rename the module"):
        ForwardCode.of(graph_with(target))


def test_names_of_every_kind_are_held_to_the_rule() -> None:
    targets: dict[str, Any] = {"get_attr": PAYLOADS[0], "call_method": PAYLOADS[0], "call_function": torch.relu}
    named: dict[str, Any] = {PAYLOADS[0]: 1}
    for op, target in targets.items():
        graph = Graph()
        x = graph.placeholder("x")
        graph.output(graph.create_node(op, target, (x,), named if op == "call_function" else {}))
        with pytest.raises(SourceNameError):
            ForwardCode.of(graph)
    assert "up-proj" in ForwardCode.of(graph_with("blocks.0.up-proj")).source


def test_the_rule_stands_under_python_o() -> None:
    code = (
        "from torch.fx import Graph\nfrom ltepass.passes.insert.generated_forwards import ForwardCode\ng = Graph()\n"
        "g.output(g.create_node('call_module', 'x\") or 1 or (\"', (g.placeholder('x'),)))\n"
        "try: ForwardCode.of(g)\nexcept ValueError as e: print(type(e).__name__)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "SourceNameError", done.stderr


class Odd(nn.Module):
    """An FFN whose linears have names that no source may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module('up"', nn.Linear(8, 16))
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(getattr(self, 'up"')(x)))


def test_an_owner_with_such_names_is_served_by_hooks() -> None:
    model = Odd().eval()
    assert trace_owner(model) is None
    x = torch.randn(2, 3, 8)
    want = model(x)
    ltepass.transform(model, (x,))
    assert lte_state(model).sites[0].kind == "inline"
    assert torch.equal(model(x), want)
    with pytest.raises(CheckpointError, match="up is"):  # and is not saved: no checkpoint may name them
        ltepass.save(model, "never-written")
    assert not Path("never-written").exists()


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for child in children for text in strings(child)]


@pytest.mark.parametrize("name", ["aligned", "inline", "fused", "encoder_decoder"])
def test_each_name_of_a_parameter_is_written_once(name: str) -> None:
    entry = json.loads((CHECKPOINTS / "v2" / name / "config.json").read_text())["quantization_config"]
    for site in entry["sites"]:
        names = [text for text in strings(site) if text.endswith((".weight", ".bias"))]
        assert len(names) == len(set(names)) > 1
        assert FFNSite.from_dict(site).to_dict() == site


def test_the_first_version_reads_as_the_same_sites() -> None:
    for folder in sorted((CHECKPOINTS / "v1").iterdir()):
        first, second = (
            json.loads((CHECKPOINTS / v / folder.name / "config.json").read_text())["quantization_config"]["sites"]
            for v in ("v1", "v2")
        )
        assert [FFNSite.from_dict(site) for site in first] == [FFNSite.from_dict(site) for site in second]


def test_renaming_reaches_every_field() -> None:
    rows = {n: NeuronRows(param=f"a.{n}.weight", dim=0, start=0, step=1) for n in ("u", "ub", "g", "gb", "d")}
    site = FFNSite(
        name="a", owner="a", kind="aligned", router="a.router", up="a.u", gate="a.g", down="a.d", activation="silu",
        d_model=2, d_ff=4, up_rows=rows["u"], up_bias=rows["ub"], gate_rows=rows["g"], gate_bias=rows["gb"],
        down_rows=rows["d"], down_bias="a.d.bias", neurons=tuple(rows.values()), group_size=2,
    )  # fmt: skip
    moved = site.renamed(lambda path: f"b.{path}").to_dict()
    names = [text for text in strings(moved) if text not in ("aligned", "silu")]
    assert len(names) == 7 + 5
    assert all(text.startswith("b.a") for text in names)
    assert site.renamed(lambda path: f"b.{path}").renamed(lambda path: path.removeprefix("b.")) == site
    assert replace(site, name="a#1").renamed(lambda path: f"b.{path}").name == "b.a#1"
