"""A model that `ltepass.quantize` changed is exported with torchao's very codes. Nothing is compiled here."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import ltepass
from ltepass.errors import ExportError
from ltepass.exporting import export_model
from ltepass.exporting.folder import About
from ltepass.kernels.weight_formats import Format
from ltepass.passes.capture.decoder_step import DecoderStep, capture_step
from ltepass.routed.torchao_weights import holds_int8, int8_parts
from tests.models.zoo import VOCAB, llama, made_once, transformed
from tests.passes.test_export_passes import Plain
from tests.stand_in_torchao import put_in_place

PROMPT, NEW = [5, 17, 9, 33, 21], 8


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


@made_once
def quantised() -> Any:
    """Half of the neurons active."""
    model = transformed("llama", num_key_value_heads=1)
    ltepass.calibrate(model, [torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))])
    ltepass.set_sparsity(model, 0.5)
    return ltepass.quantize(model)


@cache
def captured() -> DecoderStep:
    return capture_step(quantised(), length=32)


def exported(
    patch: pytest.MonkeyPatch, folder: Path, linears: Format | None = None, floats: str | None = None
) -> tuple[GraphModule, About]:
    """The graph that `ltepass.export` would compile, and what it would say of it. floats: no codes of this weight."""
    made, model, step = list[tuple[GraphModule, About]](), quantised(), copy.deepcopy(captured())
    step.codes.pop(floats or "", None)

    def write(step: DecoderStep, folder: Path, *of: Any) -> None:
        made.append((step.graph, export_model._about(step, *of)))

    patch.setattr(export_model, "capture_step", lambda *_: step)
    patch.setattr(export_model, "_write", write)
    ltepass.export(model, folder, length=32, linears=linears)
    return made[0]


def greedy(graph: Any) -> list[int]:
    cache, ids, position, out = torch.zeros(captured().cache.shape), PROMPT, 0, list[int]()
    with torch.no_grad():
        while len(out) < NEW:
            logits = graph(torch.tensor([ids]), torch.tensor(position), cache)
            position, ids = position + len(ids), [int(logits[0, -1].argmax())]
            out += ids
    return out


@pytest.mark.parametrize("linears", [None, "int8"])
def test_the_package_holds_the_codes_and_says_what_the_lowered_model_says(
    linears: Format | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = quantised()
    parts = {name: int8_parts(p) for name, p in model.named_parameters() if holds_int8(p)}
    graph, about = exported(monkeypatch, tmp_path, linears)
    held = dict(graph.named_buffers())
    for name, (codes, scale) in parts.items():
        stem = f"model.{name}".replace(".", "_") + ("_neuron" if ".mlp." in name else "")
        if not any(f".{x}_proj." in name for x in "qkv"):
            assert torch.equal(held[f"{stem}_codes"], codes), name
            assert torch.equal(held[f"{stem}_scale"], scale), name
    for layer in range(2):
        qkv = [parts[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
        assert torch.equal(held[f"merged_{layer}_weight_codes"], torch.cat([codes for codes, _ in qkv]))
        assert torch.equal(held[f"merged_{layer}_weight_scale"], torch.cat([scale for _, scale in qkv]))
    kinds = [str(getattr(n.target, "__name__", "")) for n in graph.graph.nodes]
    assert sum("embedding_int8" in kind for kind in kinds) == (linears == "int8"), "the table where that is asked for"
    assert (about.linears, about.head) == ("int8", "int8")
    assert about.gated_bytes == 2 * (3 * 60 * 24 + 2 * 60 * 4), "a byte a weight"
    assert greedy(graph) == greedy(Plain(graph).run)
    if linears is None:
        out = ltepass.lower(model).generate(torch.tensor([PROMPT]), max_new_tokens=NEW, eos_token_id=None)
        assert greedy(graph) == out[0, len(PROMPT) :].tolist()


def test_a_head_that_is_tied_to_the_table_is_none_of_int8() -> None:
    model: Any = llama(tie_word_embeddings=True)
    assert (export_model._head(model, None), export_model._head(model, "int8")) == ("float32", "int8")


def test_an_ffn_of_codes_and_floats_keeps_both_behind_its_mask(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph, _ = exported(monkeypatch, tmp_path, floats="model.model.layers.0.mlp.up_proj.weight")
    assert "layers.0.mlp.router: kept masked-dense: some of its weights are in codes, and not all" in caplog.text
    held = dict(graph.named_buffers())
    assert "model_model_layers_0_mlp_up_proj_weight_codes" not in held
    down = captured().codes["model.model.layers.0.mlp.down_proj.weight"][0]
    assert down is not None
    assert torch.equal(held["model_model_layers_0_mlp_down_proj_weight_codes"], down)
    assert "model_model_layers_1_mlp_up_proj_weight_neuron_codes" in held
    assert greedy(graph) == greedy(captured().graph), "they mean the same"


def test_a_pass_that_is_left_out_leaves_floats_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LTEPASS_SKIP", "quantise_routed_ffn")
    graph, _ = exported(monkeypatch, tmp_path)
    assert "up_proj.weight: kept in floats: no op reads its codes there" in caplog.text
    assert greedy(graph) == greedy(captured().graph), "they mean the same"


def test_codes_that_no_op_reads_are_refused(tmp_path: Path) -> None:
    model = quantised()
    weight: Any = model.get_parameter("lm_head.weight")
    weight.zero_point.fill_(3)
    with pytest.raises(ExportError, match=r"lm_head.weight is a \w+ on cpu, and its codes have a zero point"):
        ltepass.export(model, tmp_path)
