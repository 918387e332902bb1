"""shortlist_head: the head alone, wherever it stands behind the output; and what it says where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ltepass
from ltepass.errors import ConfigError, ExportError
from ltepass.exporting import export_model
from ltepass.exporting.export_model import passes
from ltepass.exporting.folder import bytes_read
from ltepass.kernels import linear_reference, weight_formats
from ltepass.kernels.weight_formats import Format
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from ltepass.passes.lower.shortlist_head import HEAD
from tests.models.zoo import VOCAB, ids, llama, transformed
from tests.passes.test_export_passes import Plain, _Logits, captured, count

ROWS = 7


def shortlisted(model: nn.Module, *inputs: Tensor, linears: Format | None = "int8") -> tuple[GraphModule, GraphJob]:
    graph = captured(model, *inputs)
    return graph, run_passes(passes(linears, ROWS), GraphJob(graph))


@pytest.mark.parametrize("routed", [True, False])
def test_of_a_language_model_it_is_the_last_linear(routed: bool) -> None:
    model: Any = transformed("llama", hidden_size=96) if routed else llama(hidden_size=96).eval()
    before = captured(_Logits(model), ids())
    run_passes(passes("int8"), GraphJob(before))
    graph, _ = shortlisted(_Logits(model), ids())
    assert count(graph, "linear_shortlist") == 1
    assert count(graph, "linear_int8") == count(before, "linear_int8") - 1
    (node,) = (n for n in graph.graph.nodes if getattr(n.target, "_opname", "") == "linear_shortlist")
    head = model.get_output_embeddings().weight.detach()
    codes, scale, *scan = (graph.get_buffer(str(n.target)) for n in node.args[1:5])
    assert torch.equal(codes, weight_formats.quantise_int8(head)[0])
    assert torch.equal(scan[0], weight_formats.int4_rows(weight_formats.dequantise_int8(codes, scale))[0])
    assert node.args[5] == ROWS
    with torch.no_grad():
        y, dense = graph(ids()), before(ids())
        torch.testing.assert_close(y, Plain(graph).run(ids()), rtol=1e-4, atol=1e-4)
    assert torch.equal(y.argmax(-1), dense.argmax(-1))
    assert ((y == dense).sum(-1) >= ROWS).all()
    assert not torch.equal(y, dense)
    read, less = bytes_read(before)[0], bytes_read(graph)[0]
    assert read - less == VOCAB * (96 + 4) - ROWS * (96 + 4) - VOCAB * (48 + 6)


class Capped(nn.Module):
    """A head whose logits are capped and scaled, as Gemma's; and a part of it, or more that reads it."""

    def __init__(self, d: int = 64, also: str = "") -> None:
        super().__init__()
        self.body, self.head, self.also = nn.Linear(d, d), nn.Linear(d, 90), also

    def forward(self, x: Tensor) -> Any:
        logits = self.head(torch.tanh(self.body(x)))
        if self.also == "a sum":
            return logits + self.body(x).sum(-1, keepdim=True)
        capped = 30 * torch.tanh(logits / 30)
        return (capped, x) if self.also == "an output" else capped[:, -1:]


def test_what_changes_numbers_each_by_itself_may_stand_behind_it() -> None:
    torch.manual_seed(0)
    model, x = Capped().eval(), torch.randn(2, 3, 64)
    graph, _ = shortlisted(model, x)
    assert count(graph, "linear_shortlist") == 1
    with torch.no_grad():
        h = linear_reference.linear_int8(x, *weight_formats.quantise_int8(model.body.weight), model.body.bias)
        codes, scale = weight_formats.quantise_int8(model.head.weight)
        scan = weight_formats.int4_rows(weight_formats.dequantise_int8(codes, scale))
        args = (torch.tanh(h), codes, scale, *scan, ROWS, model.head.bias)
        meant = 30 * torch.tanh(linear_reference.linear_shortlist(*args) / 30)
        torch.testing.assert_close(graph(x), meant[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "linears", "reason"),
    [
        (Capped(), None, "no linear in int8 makes the output"),
        (Capped(), "int4", "no linear in int8 makes the output"),
        (Capped(also="a sum"), "int8", "no linear in int8 makes the output"),
        (Capped(also="an output"), "int8", "no linear in int8 makes the output"),
        (Capped(40), "int8", "d_in is no multiple of 32"),
    ],
)
def test_where_there_is_none_it_says_why(model: Capped, linears: Format | None, reason: str) -> None:
    x = torch.randn(2, 3, model.body.in_features)
    graph, job = shortlisted(model.eval(), x, linears=linears)
    assert job.notes == {HEAD: reason}
    assert count(graph, "linear_shortlist") == 0


def test_an_export_refuses_what_has_none(tmp_path: Path) -> None:
    model = llama().eval()
    with pytest.raises(ConfigError, match="shortlist is 0; expected at least 1 row"):
        ltepass.export(model, tmp_path, linears="int8", shortlist=0)
    with pytest.raises(ExportError, match="shortlist is 5, and no linear in int8 makes the output; expected linears"):
        ltepass.export(model, tmp_path, length=16, shortlist=5)
    with pytest.raises(ExportError, match="shortlist is 5, and d_in is no multiple of 32"):
        ltepass.export(model, tmp_path, length=16, linears="int8", shortlist=5)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_says_what_its_head_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = []
    monkeypatch.setattr(export_model, "_write", lambda step, _, *of: said.append(export_model._about(step, *of)))
    ltepass.export(llama(hidden_size=96).eval(), tmp_path, length=16, linears="int8", shortlist=5)
    assert [(about.linears, about.head) for about in said] == [("int8", "int8, shortlist 5")]
