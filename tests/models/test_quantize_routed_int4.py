"""`ltepass.quantize(model, "int4")` of a model with routers: down's blocks lie along a neuron, for the sparse op."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltepass
from ltepass.calibration.int4_codes import int4_codes_by_input
from ltepass.config import RouterKind
from ltepass.errors import CheckpointError, LoweringError
from ltepass.exporting.export_model import passes
from ltepass.kernels.weight_formats import dequantise_int4
from ltepass.measure import token_bytes
from ltepass.passes.capture.decoder_step import capture_step
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from ltepass.routed.routed import routers_of
from ltepass.routed.torchao_weights import has_blocks_by_input, holds_int4, int4_parts_by_input
from tests.models.zoo import VOCAB, logits, mlp, transformed
from tests.stand_in_torchao import put_in_place

SIZES: Any = {"hidden_size": 96, "intermediate_size": 128}


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    if importlib.util.find_spec("torchao") is None:  # transformers asks for the package
        monkeypatch.setattr("ltepass.transformers_hook.attach_quantised", lambda model: None)


def text(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(seed))


def coded(name: str = "llama", router: RouterKind = "linear", calibration: Any = None) -> Any:
    """At 50 %, calibrated before its weights become codes."""
    model = transformed(name, router=router, **SIZES)
    ltepass.calibrate(model, [text()])
    ltepass.set_sparsity(model, 0.5)
    return ltepass.quantize(model, "int4", calibration)


def down_of(model: Any, layer: int = 0) -> Tensor:
    weight: Tensor = mlp(model, layer).get_parameter("down_proj.weight")
    return weight


@given(st.integers(1, 3), st.sampled_from((1, 2, 33, 70)), st.integers(0, 2**31))
def test_codes_by_input_lose_less_where_later_inputs_make_up_for_it(blocks: int, d_in: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(32 * blocks, d_in, generator=g), torch.randn(256, d_in, generator=g)
    x = x @ torch.randn(d_in, d_in, generator=g)
    lost = []
    for moment in (None, x.T @ x):
        codes, scale = int4_codes_by_input(weight, moment)
        assert (codes.shape, scale.shape) == (weight.shape, (blocks, d_in))
        assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)
        assert int(codes.min()) >= -8
        assert int(codes.max()) <= 7
        meant = codes * scale.float().repeat_interleave(32, 0)
        assert (meant - weight).abs().max() <= 0.3 * weight.abs().max() or moment is not None
        lost.append(float((x.double() @ (weight - meant).double().T).square().sum()))
    assert lost[1] <= lost[0] * 1.01 or d_in == 2, "two inputs: the first has one to make up for it, greedily"


@pytest.mark.parametrize("router", ["linear", "proxy"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("calibration", [None, [text()]])
def test_the_sparse_op_reads_the_very_codes(name: str, router: RouterKind, calibration: Any) -> None:
    model = coded(name, router, calibration)
    assert all(holds_int4(down_of(model, i)) and has_blocks_by_input(down_of(model, i)) for i in (0, 1))
    expected = logits(model)
    ltepass.lower(model)
    assert "kept masked-dense" not in str(ltepass.report(model))
    for layer, made in enumerate(routers_of(model)):
        assert made.coded is not None
        assert made.coded.format == "int4"
        codes, scale = int4_parts_by_input(down_of(model, layer))
        assert torch.equal(made.coded.down[0], codes)
        assert torch.equal(made.coded.down[1], scale)
        dense = down_of(model, layer).dequantize()
        assert torch.equal(dequantise_int4(codes, scale, None).T, dense)
    assert (logits(model) - expected).norm() < 0.05 * expected.norm(), "inputs have 8 bits"
    assert torch.equal(logits(ltepass.unlower(model)), expected)


def test_gptq_loses_less_than_rounding_in_a_routed_model() -> None:
    floats = transformed("llama", **SIZES)
    ltepass.calibrate(floats, [text()])
    ltepass.set_sparsity(floats, 0.5)
    wanted = logits(floats)
    plain, knowing = (float((logits(coded(calibration=c)) - wanted).norm()) for c in (None, [text()]))
    assert knowing < plain


@pytest.mark.parametrize("lowered", [False, True])
def test_bytes_are_those_of_half_bytes_and_scales(lowered: bool) -> None:
    """A weight and its share of a scale: 4.5 bits, of active neurons alone; the router is read whole."""
    model = coded()
    if lowered:
        ltepass.lower(model)
    bits = ltepass.report(model).bits
    assert bits is not None
    weights, router = 3 * 96 * 128, next(routers_of(model))
    whole = 8 * sum(t.nbytes for t in router.operands() if t is not None) / weights
    assert bits.held == pytest.approx(4.5 + whole)
    density = [made.density or 0.0 for made in routers_of(model)]
    assert bits.read == pytest.approx(4.5 * sum(density) / 2 + whole)
    saved = token_bytes.weights_read(model, 1.0) - token_bytes.weights_read(model, 0.5)
    assert saved == pytest.approx(2 * 0.5 * weights * 4.5 / 8)


def test_scope_model_says_what_reads_them() -> None:
    with pytest.raises(LoweringError, match=r"IntxUnpackedToInt8Tensor.*; lower\(linears=\"int4\"\) reads it"):
        ltepass.lower(coded(), "model")


def test_an_ffn_of_other_sizes_is_left_whole() -> None:
    for d_model, d_ff in ((48, 128), (96, 100)):
        sizes: Any = {"hidden_size": d_model, "intermediate_size": d_ff, "head_dim": 32}
        model = transformed("llama", num_attention_heads=4, **sizes)
        ltepass.quantize(model, "int4")
        assert not any(holds_int4(p) for name, p in model.named_parameters() if ".mlp." in name)
        assert holds_int4(model.get_parameter("model.layers.0.self_attn.o_proj.weight"))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao writes the file")
def test_a_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    model = coded(calibration=[text()])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval()), expected)
    assert torch.equal(down_of(again).qdata, down_of(model).qdata)  # type: ignore[attr-defined]
    tensors = load_file(tmp_path / "model.safetensors")
    scale = "model.layers.0.mlp.down_proj._weight_scale"
    assert tensors[scale].shape == (3, 128)
    tensors[scale] = tensors[scale][:, :4].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the scale of model.layers.0.mlp.down_proj.weight"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("router", ["linear", "proxy"])
def test_an_export_takes_the_codes_as_they_stand(router: RouterKind) -> None:
    model = coded(router=router, calibration=[text()])
    step = capture_step(model, length=16)
    job = run_passes(passes(None), GraphJob(step.graph, step.codes))
    name = "routed_ffn_int4" if router == "linear" else "routed_proxy_ffn_int4"
    found = [n for n in step.graph.graph.nodes if getattr(n.target, "_opname", "") == name]
    assert len(found) == job.lowered == 2
    held = dict(step.graph.named_buffers())
    codes, scale = int4_parts_by_input(down_of(model))
    assert any(t.shape == codes.shape and torch.equal(t, codes) for t in held.values() if t.dtype == torch.uint8)
    assert any(t.shape == scale.shape and torch.equal(t, scale) for t in held.values() if t.dtype == torch.float16)
    ids, position, cache = step.inputs
    with torch.no_grad():
        y = step.graph(ids, position, cache)
    expected = logits(model, ids)[:, -y.shape[1] :]
    assert (y - expected).norm() < 0.05 * expected.norm()
