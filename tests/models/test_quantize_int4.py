"""`ltepass.quantize(model, "int4")`: codes by rounding or by GPTQ, saved, loaded, lowered and exported as they are."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ltepass
from ltepass.calibration import int4_codes as gptq
from ltepass.calibration.gptq import TURNS
from ltepass.calibration.int4_codes import best_scale, int4_codes
from ltepass.commands import export
from ltepass.commands.load import load
from ltepass.corpora import token_blocks
from ltepass.errors import CalibrationError, CheckpointError, ConfigError
from ltepass.exporting import export_model
from ltepass.kernels.weight_formats import dequantise_int4, unpack_int4
from ltepass.passes.capture.decoder_step import capture_step
from ltepass.passes.graph.pipeline import GraphJob, run_passes
from ltepass.progress import heard_by
from ltepass.routed.batches import run_batches
from ltepass.routed.torchao_weights import floats_of, holds_int4, holds_int8, is_quantised, parts_of
from tests.models.zoo import VOCAB, Own, build, ids, logits
from tests.serving import words
from tests.stand_in_torchao import put_in_place

SIZES: Any = {"hidden_size": 96, "intermediate_size": 128}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    if importlib.util.find_spec("torchao") is None:  # transformers asks for the package
        monkeypatch.setattr("ltepass.transformers_hook.attach_quantised", lambda model: None)


def text(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(seed))


def coded(calibration: Any = None) -> Any:
    return ltepass.quantize(build("llama", **SIZES), "int4", calibration)


def meant(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * scale.float().repeat_interleave(32, 1)


def lost(weight: Tensor, codes: Tensor, scale: Tensor, moment: Tensor) -> float:
    """|X (W - Q)^T|^2, in fp64."""
    off = (weight - meant(codes, scale)).double()
    return float((off @ moment.double() * off).sum())


MANY = 33  # rows: of one alone an input's best code may be the worse one of all, and it loses up to 2.5 times as much


@given(st.sampled_from((1, 2, 9, MANY)), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1.0]))
def test_what_rounding_loses_later_inputs_make_up_for(d_out: int, blocks: int, seed: int, dead: float) -> None:
    g, d_in = torch.Generator().manual_seed(seed), 32 * blocks
    weight = torch.randn(d_out, d_in, generator=g)
    x = torch.randn(256, d_in, generator=g) @ torch.randn(d_in, d_in, generator=g)
    x *= torch.rand(d_in, generator=g) >= dead  # some inputs, or all of them, are never seen
    moment = x.T @ x
    codes, scale = int4_codes(weight, moment)
    assert (int(codes.min()) >= -8, int(codes.max()) <= 7) == (True, True)
    scales = torch.stack([best_scale(block, torch.ones(32)) for block in weight.split(32, 1)], 1)
    nearest = (weight / scales.float().repeat_interleave(32, 1)).round().clamp(-8, 7)
    if dead == 1.0:
        assert torch.equal(codes, nearest.to(torch.int8)), "nothing to make up for"
    elif d_out == MANY:
        assert lost(weight, codes, scale, moment) < lost(weight, nearest, scales, moment)
    assert (weight - meant(codes, scale)).abs().max() < 4 * weight.abs().max()


def test_gptq_loses_half_of_what_rounding_does_on_inputs_that_go_together() -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(64, 128, generator=g),
        torch.randn(2048, 24, generator=g) @ torch.randn(24, 128, generator=g),
    )
    moment = x.T @ x
    codes, scale = int4_codes(weight, moment)
    alone, scales = int4_codes(weight, torch.zeros_like(moment))
    assert lost(weight, codes, scale, moment) < 0.5 * lost(weight, alone, scales, moment)


def test_a_block_of_zeros_and_one_of_tiny_weights() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1e-9  # its scale is no fp16
    codes, scale = int4_codes(weight, torch.eye(64))
    assert not codes.any()
    assert not scale.any()


@pytest.mark.parametrize("calibration", [None, [text()]])
def test_every_linear_is_int4_but_a_head_in_int8(calibration: Any) -> None:
    model, plain = coded(calibration), build("llama", **SIZES)
    linears = {f"{path}.weight" for path, module in plain.named_modules() if isinstance(module, nn.Linear)}
    held = dict(model.named_parameters())
    assert {name for name, weight in held.items() if holds_int8(weight)} == {"lm_head.weight"}
    assert {name for name, weight in held.items() if holds_int4(weight)} == linears - {"lm_head.weight"}
    for name in linears:
        plain.get_parameter(name).data.copy_(floats_of(parts_of(held[name])))
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for name, p in held.items() if name in linears)


def test_codes_of_text_are_nearer_on_it_than_rounding() -> None:
    expected = logits(build("llama", **SIZES))
    off = {kind: (logits(model) - expected).norm() for kind, model in (("text", coded([ids()])), ("none", coded()))}
    assert off["text"] < off["none"]


def test_the_same_text_in_other_batches_and_under_padding_gives_the_same_codes() -> None:
    padded = torch.cat([text(), torch.zeros(4, 7, dtype=torch.int64)], 1)
    mask = (torch.arange(39) < 32).long().expand(4, -1)
    model, others = coded([text()]), (coded(text().split(2)), coded([{"input_ids": padded, "attention_mask": mask}]))
    for other in others:
        assert (logits(model) - logits(other)).norm() < 0.05 * logits(model).norm()
        same = [float((a.qdata == b.qdata).float().mean()) for a, b in zip(weights(model), weights(other), strict=True)]
        assert same[:5] == [1.0] * 5, "the first turn, and more"
        assert min(same) > 0.5, "sums are rounded otherwise: a code tips, and others make up for it"
    untold = coded([padded])
    assert not torch.equal(weights(model)[0].qdata, weights(untold)[0].qdata), "padding that nothing tells is text"


def weights(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if holds_int4(p)]


def test_later_turns_see_the_codes_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[list[bool]]()
    run, turns = run_batches, math.ceil(14 / math.ceil(14 / TURNS))

    def watched(model: Any, batches: Any) -> None:
        seen.append([holds_int4(p) for name, p in model.named_parameters() if name.endswith("up_proj.weight")])
        run(model, batches)

    monkeypatch.setattr(gptq, "run_batches", watched)
    coded([text()])
    assert len(seen) == turns
    assert seen[0] == [False, False]
    assert seen[-1][0]


def test_lowered_reads_the_codes_and_an_export_holds_them(tmp_path: Path) -> None:
    model = coded([text()])
    expected, weight = logits(model), model.get_submodule(DOWN).weight
    packed, scale, _ = parts_of(weight)
    assert packed is not None
    assert scale is not None
    assert torch.equal(unpack_int4(packed).to(torch.int8) - 8, weight.qdata)
    step = capture_step(model, length=16)
    job = run_passes(export_model.passes("int8"), GraphJob(step.graph, step.codes))
    leaves = dict(job.gm.named_buffers())
    stem = f"model.{DOWN}.weight".replace(".", "_")
    assert torch.equal(leaves[f"{stem}_codes"], packed)
    assert torch.equal(leaves[f"{stem}_scale"], scale)
    about = export_model._about(step, model, "int8")
    assert (about.linears, about.head) == ("int4", "int8")
    ltepass.lower(model, ffn=False)
    assert 0 < (logits(model) - expected).norm() < 0.03 * expected.norm(), "the inputs have 8 bits"
    assert torch.equal(logits(ltepass.unlower(model)), expected)


@pytest.mark.parametrize("calibration", [None, [text()]])
def test_a_folder_gives_the_codes_back_bit_for_bit(calibration: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="transformers asks for the package")
    model = coded(calibration)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert len(weights(again)) == 14


def saved(folder: Path) -> Path:
    build("llama", **SIZES, eos_token_id=None).save_pretrained(folder)  # type: ignore[operator]
    words().save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 60}" for i in range(600)))
    return folder


def test_the_command_quantises_by_a_text_and_exports_the_rest_in_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[Any, Any]]()
    monkeypatch.setattr(ltepass, "export", lambda model, out, **options: asked.append((model, options["linears"])))
    monkeypatch.setattr(export, "read_about", lambda out: SimpleNamespace(token_bytes=3, gated_bytes=0))
    folder = saved(tmp_path / "saved")
    options = export.ExportOptions(linears="int4", text=folder / "text.txt")
    assert export.export(str(folder), tmp_path / "out", options)["token_bytes"] == 3
    ((model, linears),) = asked
    (ids,) = token_blocks(words(), (folder / "text.txt").read_text(), export.LENGTH, export.BLOCKS).split(4)
    expected = ltepass.quantize(load(str(folder)), "int4", [ids])
    assert torch.equal(logits(model), logits(expected))
    assert linears == "int8"


@pytest.mark.parametrize(
    ("linears", "written", "words"),
    [("int8", "w1", "linears are int8; expected int4"), ("int4", "w1 w2", "text.txt has no whole block of 512 tokens")],
)
def test_a_text_that_the_command_cannot_use_is_one_line(linears: Any, written: str, words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "text.txt").write_text(written)
    with pytest.raises(ConfigError, match=words):
        export.export(str(folder), tmp_path / "out", export.ExportOptions(linears=linears, text=folder / "text.txt"))


def low_bits() -> Any:
    model: Any = build("llama", **SIZES)
    ltepass.transform(model, config=ltepass.LTEConfig(router="proxy", inactive="low_bit"), calibration=[text()])
    ltepass.set_mode(model, "hard")
    return ltepass.quantize(model, "int4", [text()])


def test_a_model_of_planes_has_attention_in_int4_and_saves(tmp_path: Path) -> None:
    model = low_bits()
    held = {name for name, weight in model.named_parameters() if holds_int4(weight)}
    assert len(held) == 8
    assert all("self_attn" in name for name in held)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj._weight_"
    assert (tensors[f"{q}qdata"].dtype, tensors[f"{q}scale"].dtype) == (torch.int8, torch.float16)
    assert tensors[f"{q}scale"].shape == (96, 3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.to(torch.bfloat16).save_pretrained(tmp_path / "again")  # torchao rounds scales to the model's dtype
    assert load_file(tmp_path / "again" / "model.safetensors")[f"{q}scale"].dtype == torch.float16
    for change, said in BROKEN.items():
        crafted = load_file(tmp_path / "model.safetensors")
        CHANGES[change](crafted, q)
        (tmp_path / "crafted").mkdir(exist_ok=True)
        save_file(crafted, tmp_path / "crafted" / "model.safetensors", {"format": "pt"})
        (tmp_path / "crafted" / "config.json").write_text((tmp_path / "config.json").read_text())
        with pytest.raises(CheckpointError, match=said):
            AutoModelForCausalLM.from_pretrained(tmp_path / "crafted")


CHANGES: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "a code of 5 bits": lambda t, q: t[f"{q}qdata"].view(-1)[:1].fill_(8),
    "a scale too few": lambda t, q: t.update({f"{q}scale": t[f"{q}scale"][:, :1].contiguous()}),
    "no number": lambda t, q: t[f"{q}scale"].fill_(float("inf")),
    "a zero point": lambda t, q: t[f"{q}zero_point"].fill_(1),
    "scales of int8": lambda t, q: t.update({f"{q}scale": t[f"{q}scale"].float()}),
}
BROKEN = {
    "a code of 5 bits": "q_proj.weight: its codes have more than 4 bits",
    "a scale too few": r"the scale of .*q_proj.weight .*expected .'F16', .96, 3",
    "no number": "a scale of .*q_proj.weight is not a number",
    "a zero point": "a zero point of .*q_proj.weight is not 0",
    "scales of int8": r"the scale of .*q_proj.weight .*expected .'F32', .96, 1",
}


def test_how_far_it_is_is_told_linear_by_linear() -> None:
    heard = list[tuple[str, int, int]]()
    with heard_by(lambda *step: heard.append(step)):
        coded([text()])
    assert [done for what, done, total in heard if what == "codes of 4 bits" and total == 14] == [*range(15)]


def test_a_dense_model_in_codes_is_served_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    from transformers.cli.serving.model_manager import ModelManager

    from ltepass.serving.lowered_server import lowered_as_loaded

    expected = coded()
    monkeypatch.setattr(ModelManager, "_load_model", lambda self, name: coded())
    with lowered_as_loaded():
        model: Any = ModelManager._load_model(None, "any")
    assert torch.equal(logits(model), logits(ltepass.lower(expected, ffn=False)))


def test_a_plain_module_takes_int4_too() -> None:
    model = ltepass.quantize(Own().eval(), "int8")
    assert is_quantised(model)
    with pytest.raises(ConfigError, match=r"no linear of Own can be quantised to int4: \d+ left: have a d_in"):
        ltepass.quantize(Own().eval(), "int4")


def not_a_number() -> Any:
    model: Any = build("llama", **SIZES)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "weights", "calibration", "error", "words"),
    [
        (lambda: build("llama", **SIZES), "int8", [text()], ConfigError, 'weights "int4" or "tiers" with it'),
        (lambda: build("llama", **SIZES), "int4", [], CalibrationError, "no token reached a linear"),
        (
            lambda: build("llama", **SIZES),
            "int4",
            text(),
            CalibrationError,
            r"of one dimension .*pass a list of batches",
        ),
        (lambda: build("llama", **SIZES), "int4", ["a text"], CalibrationError, "a batch is the text 'a text'"),
        (not_a_number, "int4", [torch.tensor([[5, 1]])], CalibrationError, "q_proj saw values that are not finite"),
        (
            lambda: ltepass.quantize(build("llama", **SIZES), "int4"),
            "int4",
            None,
            ConfigError,
            "holds weights of the model as codes already",
        ),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    make: Callable[[], Any], weights: Any, calibration: Any, error: type[Exception], words: str
) -> None:
    model = make()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(error, match=words):
        ltepass.quantize(model, weights, calibration)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_fails_half_way_is_undone(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("llama", **SIZES), list[bool]()
    expected = logits(model)
    codes = gptq.int4_codes

    def few(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(is_quantised(model))
        if len(calls) == 5:
            raise error
        return codes(weight, moment)

    monkeypatch.setattr(gptq, "int4_codes", few)
    with pytest.raises(error):
        ltepass.quantize(model, "int4", [text()])
    assert calls[-1]
    assert not is_quantised(model)
    assert torch.equal(logits(model), expected)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_what_the_codes_stand_for_is_what_the_op_reads(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes, scale = int4_codes(torch.randn(8, 64, generator=g), torch.eye(64))
    from ltepass.routed.torchao_weights import int4_weight

    packed, read, none = parts_of(int4_weight(codes, scale, torch.float32))
    assert packed is not None
    assert read is not None
    assert torch.equal(dequantise_int4(packed, read, none), meant(codes, scale))
