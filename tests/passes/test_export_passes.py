"""The passes of an exported step: linears merged, quantised, and weights stored as the sparse op gathers them."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import ltepass
from ltepass.exporting.export_model import passes
from ltepass.kernels import linear_reference, weight_formats
from ltepass.kernels.routed_schema import IN_CODES, LINEAR_INT8, op_in_codes
from ltepass.kernels.weight_formats import SparseFormat
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from ltepass.passes.lower.lay_out_neurons import LayOutNeurons
from ltepass.passes.lower.lower_linears import LowerLinears
from ltepass.passes.lower.lower_routed_ffn import LowerRoutedFFN
from ltepass.passes.lower.lower_tiers import LowerTiers
from ltepass.passes.lower.merge_linears import MergeLinears
from ltepass.passes.lower.pack_tiers import PackTiers
from ltepass.passes.lower.quantise_linears import Format, QuantiseLinears
from ltepass.passes.lower.quantise_routed_ffn import QuantiseRoutedFFN
from tests.models.test_tiers import tiered
from tests.models.zoo import VOCAB, ids, transformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fan(nn.Module):
    """Several linears of one input, one of another input, and one whose weight is read twice."""

    def __init__(self, d_in: int, widths: list[int], biases: list[bool], dtype: torch.dtype) -> None:
        super().__init__()
        pairs = zip(widths, biases, strict=True)
        self.fan: Any = nn.ModuleList(nn.Linear(d_in, width, bias, dtype=dtype) for width, bias in pairs)
        self.last = nn.Linear(sum(widths), d_in, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([torch.tanh(linear(x)) for linear in self.fan], -1)
        z: Tensor = self.last(y)
        again: Tensor = self.fan[0](z)
        return z + again.sum(-1, keepdim=True)


def captured(model: nn.Module, *inputs: Tensor) -> GraphModule:
    with torch.no_grad():
        graph = torch.export.export(model, inputs, strict=False).module(check_guards=False)
    assert isinstance(graph, GraphModule)
    return graph


def count(graph: GraphModule, name: str) -> int:
    return sum(getattr(n.target, "_opname", "") == name for n in graph.graph.nodes)


fans = st.builds(
    Fan,
    d_in=st.sampled_from((1, 32, 40, 96)),
    widths=st.lists(st.sampled_from((1, 3, 8, 33)), min_size=3, max_size=3),
    biases=st.lists(st.booleans(), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)


# Each example is a trace: shrinking one that fails would take minutes.
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(model=fans, tokens=st.sampled_from((1, 5, 40)), lowered=st.booleans())
def test_merged_linears_compute_the_same(model: Fan, tokens: int, lowered: bool) -> None:
    x = torch.randn(tokens, model.fan[0].in_features, dtype=model.last.weight.dtype)
    graph = captured(model, x)
    run_passes([MergeLinears(), *([LowerLinears()] if lowered else [])], GraphJob(graph))
    with_bias = sum(linear.bias is not None for linear in model.fan)
    groups = sum(n > 0 for n in (with_bias, 3 - with_bias))
    assert count(graph, "linear") == groups + 2, "alike ones of the fan become one; the other two stay"
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        own, ours = (model(x).double() - exact).abs().max(), (graph(x).double() - exact).abs().max()
    assert ours <= 4 * own + 1e-6


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(model=fans, tokens=st.sampled_from((1, 5)), format=st.sampled_from(("int8", "int4", "int4_minimum")))
def test_quantised_linears_are_the_op_on_quantised_weights(model: Fan, tokens: int, format: Format) -> None:
    x = torch.randn(tokens, model.fan[0].in_features, dtype=model.last.weight.dtype)
    graph = captured(model, x)
    job = run_passes([QuantiseLinears(format=format), LowerLinears()], GraphJob(graph))
    op = "linear_int8" if format == "int8" else "linear_int4"
    fit = [linear for linear in (*model.fan, model.last) if format == "int8" or linear.in_features % 32 == 0]
    assert count(graph, op) == len(fit) + (model.fan[0] in fit), "the first one's weight is read twice"
    assert count(graph, op) + count(graph, "linear") == job.linears == 5

    def weigh(linear: Any, args: tuple[Tensor]) -> Tensor:
        """What a quantised linear means."""
        if format == "int8":
            return linear_reference.linear_int8(*args, *weight_formats.quantise_int8(linear.weight), linear.bias)
        codes, scale, minimum = weight_formats.quantise_int4(linear.weight, with_minimum=format == "int4_minimum")
        return linear_reference.linear_int4(*args, codes, scale, minimum, linear.bias)

    for linear in fit:
        linear.register_forward_hook(lambda linear, args, _: weigh(linear, args))
    with torch.no_grad():
        assert torch.allclose(graph(x).float(), model(x).float(), atol=3e-2, rtol=3e-2)


class Tied(nn.Module):
    """Rows of tokens and of positions; the head may be the table of tokens."""

    def __init__(self, d: int, tied: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, d, dtype=dtype), nn.Embedding(9, d, dtype=dtype)
        self.head = nn.Linear(d, VOCAB, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.tokens(ids.view(-1, ids.shape[-1]))
        logits: Tensor = self.head(rows + self.places(torch.arange(ids.shape[-1])))
        return logits


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    d=st.sampled_from((32, 40, 96)),
    tied=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(("int8", "int4", "int4_minimum")),
)
def test_a_table_of_tokens_is_quantised_and_shares_its_codes(
    d: int, tied: bool, dtype: torch.dtype, format: Format
) -> None:
    model = Tied(d, tied, dtype)
    graph = captured(model, ids())
    run_passes([QuantiseLinears(format=format)], GraphJob(graph))
    fits = format == "int8" or d % 32 == 0
    assert count(graph, "embedding") == (1 if fits else 2), "positions stay"
    codes = {t.data_ptr() for name, t in graph.named_buffers() if name.endswith("_codes")}
    assert len(codes) == fits * (1 if tied else 2)
    if not fits:
        return
    table = model.tokens.weight.detach()
    if format == "int8":
        rows = weight_formats.dequantise_int8(*weight_formats.quantise_int8(table))
    else:
        parts = weight_formats.quantise_int4(table, with_minimum=format == "int4_minimum")
        rows = weight_formats.dequantise_int4(*parts)
    looked_up = next(n for n in graph.graph.nodes if getattr(n.target, "__name__", "").startswith("embedding_"))
    graph.graph.output_node().args = ((looked_up,),)
    graph.recompile()
    assert torch.equal(graph(ids()), rows.to(dtype)[ids()])


def test_gathered_weights_lie_by_neuron_and_the_graph_computes_the_same() -> None:
    model = transformed("llama")
    graph = captured(_Logits(model), ids())
    with torch.no_grad():
        expected = graph(ids())
    job = run_passes(passes(None), GraphJob(graph))
    assert job.lowered == 2
    assert not job.notes
    down = [n.args[8] for n in graph.graph.nodes if getattr(n.target, "_opname", "") == "routed_ffn"]
    assert [graph.get_buffer(str(n.target)).stride(0) for n in down] == [1, 1]
    with torch.no_grad():
        assert torch.allclose(graph(ids()), expected, atol=1e-5)
    assert all(p.is_contiguous() for p in model.parameters()), "the model's own weights lie as they did"


@pytest.mark.parametrize("packs", [True, False])
def test_planes_are_packed_and_the_graph_computes_the_same(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiered()
    ltepass.set_mode(model, "hard")
    graph = captured(_Logits(model), ids())
    expected = graph(ids())
    if not packs:
        monkeypatch.setenv("LTEPASS_SKIP", "pack_tiers")
    run_passes(passes(None), GraphJob(graph))
    assert (count(graph, "packed_tiered_ffn"), count(graph, "tiered_ffn")) == ((2, 0) if packs else (0, 2))
    assert (graph(ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_planes_that_two_ffns_share_are_packed_once_and_computed_ones_stay() -> None:
    model = tiered()
    ltepass.set_mode(model, "hard")
    graph = captured(_Logits(model), ids())
    run_passes([LowerTiers()], GraphJob(graph))
    first, second = [n for n in graph.graph.nodes if "tiered_ffn" in str(n.target)][:2]
    second.args = (second.args[0], *first.args[1:])
    graph.recompile()
    expected = graph(ids())
    shared = copy.deepcopy(graph)
    run_passes([PackTiers()], GraphJob(shared))
    packed = [n for n in shared.graph.nodes if "packed" in str(n.target)]
    assert len(packed) == 2
    highs = [getattr(shared, str(node.args[1].target)) for node in packed]
    assert highs[0].data_ptr() == highs[1].data_ptr()
    assert (shared(ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with graph.graph.inserting_before(first):
        computed = graph.graph.call_function(torch.ops.aten.clone.default, (first.args[1],))
        computed.meta = dict(first.args[1].meta)
    first.args = (first.args[0], computed, *first.args[2:])
    run_passes([PackTiers()], GraphJob(graph))
    assert count(graph, "tiered_ffn") == 1


@pytest.mark.parametrize("router", ["linear", "proxy"])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_gated_ffns_become_the_op_on_codes(format: SparseFormat, router: Literal["linear", "proxy"]) -> None:
    sizes: Any = {"hidden_size": 96, "intermediate_size": 128} if format == "int4" else {}
    model = transformed("llama", router=router, **sizes)
    graph = captured(_Logits(model), ids())
    job = run_passes(passes(format), GraphJob(graph))
    assert job.lowered == 2
    name = op_in_codes(format, proxied=router == "proxy").name
    found = [n for n in graph.graph.nodes if getattr(n.target, "_opname", "") == name]
    assert len(found) == 2
    assert count(graph, "routed_ffn") == count(graph, "routed_proxy_ffn") == 0
    for node in found:
        op = op_in_codes(format, proxied=router == "proxy")
        up, _, gate, _, down, *_ = op.call(node.args).weights
        strides = [graph.get_buffer(str(n.target)).stride() for n in (up, gate, down)]
        wanted = [(24, 1), (24, 1), (1, 24)] if format == "int8" else [(48, 1), (48, 1), (48, 1)]
        assert strides == wanted, "a row a neuron, and down a neuron after the other"
    with torch.no_grad():
        assert torch.allclose(graph(ids()), Plain(graph).run(ids()), atol=1e-5)
        expected = model(ids()).logits
        assert (graph(ids()) - expected).norm() < (0.1 if format == "int8" else 0.5) * expected.norm()


@pytest.mark.parametrize(
    ("format", "words"),
    [("int4", "d_model is no multiple of 32"), ("int4_minimum", "only int8 and int4 are read by a sparse op")],
)
def test_gated_ffns_that_no_op_reads_so_stay_in_floats_and_the_pass_says_why(
    format: Format, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    graph = captured(_Logits(transformed("llama")), ids())
    with caplog.at_level("INFO", logger="ltepass"):
        run_passes(passes(format), GraphJob(graph))
    assert count(graph, "routed_ffn") == 2
    assert f"quantise_routed_ffn: unchanged, 2 left: {words}" in caplog.text


def test_a_weight_that_another_ffn_shares_has_one_set_of_codes_and_computed_ones_stay() -> None:
    graph = captured(_Logits(transformed("phi3")), ids())
    run_passes([LowerRoutedFFN(), QuantiseRoutedFFN(format="int8")], GraphJob(graph))
    assert count(graph, "routed_ffn_int8") == 2, "gate and up are views of one leaf"
    graph = captured(_Logits(transformed("llama")), ids())
    run_passes([LowerRoutedFFN()], GraphJob(graph))
    first, second = (n for n in graph.graph.nodes if getattr(n.target, "_opname", "") == "routed_ffn")
    first.update_arg(4, second.args[4])
    with graph.graph.inserting_before(second):
        second.update_arg(8, graph.graph.call_function(torch.ops.aten.neg.default, (second.args[8],)))
    run_passes([QuantiseRoutedFFN(format="int8")], GraphJob(graph))
    assert (count(graph, "routed_ffn_int8"), count(graph, "routed_ffn")) == (1, 1)


@pytest.mark.parametrize(("name", "scale"), [("phi3", "an output"), ("gpt2", "an input")])
def test_codes_that_a_job_has_are_taken_where_they_have_a_scale_an_output(name: str, scale: str) -> None:
    """Of phi3 gate and up are views of one leaf; GPT-2 stores its weights an input after the other."""
    graph = captured(_Logits(transformed(name)), ids())
    leaves = {path: p.detach() for path, p in graph.named_parameters() if ".mlp." in path and p.dim() == 2}
    codes = {path: weight_formats.quantise_int8(p) for path, p in leaves.items() if "router" not in path}
    job = GraphJob(graph, dict(codes))
    run_passes(passes(None), job)
    if scale == "an input":
        assert set(job.notes.values()) == {"its codes have a scale an input"}
        assert count(graph, "routed_ffn_int8") == count(graph, "routed_ffn") == 0
        return
    for layer, node in enumerate(n for n in graph.graph.nodes if getattr(n.target, "_opname", "") == "routed_ffn_int8"):
        parts = LINEAR_INT8.call(node.args)
        up, _, gate, _, down, _, up_scale, gate_scale, _ = (
            n and graph.get_buffer(str(n.target)) for n in parts.weights
        )
        fused, scales = codes[f"model.model.layers.{layer}.mlp.gate_up_proj.weight"]
        assert torch.equal(torch.cat([gate, up]), fused)
        assert torch.equal(torch.cat([gate_scale, up_scale]), scales)
        assert torch.equal(down, codes[f"model.model.layers.{layer}.mlp.down_proj.weight"][0])
    assert layer == 1


def test_router_scores_are_neither_merged_nor_quantised() -> None:
    """Where FFNs stay masked-dense, up, gate and the router read one input, and the decision must not move."""
    model = transformed("llama")
    graph = captured(_Logits(model), ids())
    with torch.no_grad():
        run_passes([MergeLinears(), QuantiseLinears(format="int8"), LayOutNeurons()], GraphJob(graph))
    left = [n for n in graph.graph.nodes if getattr(n.target, "_opname", "") == "linear"]
    assert len(left) == 2
    assert all("router" in str(n.args[1].target) for n in left)


class Plain(torch.fx.Interpreter):
    """A graph whose linears and sparse ops are their definitions, in plain PyTorch."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "_opname", "")
        routed = {op.name: op for op in IN_CODES}.get(name)
        if routed is not None:
            c = routed.checked(args)
            return routed.masked_ffn(c, routed.mask(c))
        if name in ("linear_int8", "linear_int4", "linear_shortlist"):
            return getattr(linear_reference, name)(*args)
        return super().call_function(target, args, kwargs)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.model(ids, use_cache=False).logits
        return out


@pytest.mark.parametrize("skipped", ["merge_linears", "quantise_linears", "quantise_routed_ffn", "lay_out_neurons"])
def test_each_can_be_left_out_by_name(skipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTEPASS_SKIP", skipped)
    graph = captured(_Logits(transformed("llama")), ids())
    run_passes(passes("int8"), GraphJob(graph))
    with torch.no_grad():
        assert graph(ids()).isfinite().all()
    assert (count(graph, "linear_int8") == 0) == (skipped == "quantise_linears")
    assert (count(graph, "routed_ffn_int8") == 0) == (skipped == "quantise_routed_ffn")
