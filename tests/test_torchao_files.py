"""A model in int8 saves its codes, and a folder gives them back bit for bit; a crafted one is one CheckpointError."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

import ltepass
from ltepass.commands.evaluate import EvalOptions, evaluate
from ltepass.commands.generate import generate
from ltepass.corpora import token_blocks
from ltepass.errors import CheckpointError
from ltepass.measure.quality import perplexity
from ltepass.routed.routed import routers_of, state_of
from ltepass.routed.torchao_weights import holds_int8, int8_parts, is_quantised
from tests.models.zoo import VOCAB, Own, ids, logits, made_once, transformed
from tests.serving import words
from tests.stand_in_torchao import put_in_place

UP = "model.layers.0.mlp.up_proj._weight_"


@pytest.fixture(autouse=True)
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)


@made_once
def quantised() -> Any:
    model = transformed("llama", hidden_size=48, intermediate_size=120)
    ltepass.calibrate(model, [torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))])
    return ltepass.quantize(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nobody writes to."""
    made = tmp_path_factory.mktemp("int8")
    with pytest.MonkeyPatch.context() as patch:
        put_in_place(patch)
        quantised().save_pretrained(made)
    return made


def same(one: nn.Module, other: nn.Module) -> None:
    """Every tensor, its class included."""
    theirs = dict(other.named_parameters())
    for name, ours in one.named_parameters():
        assert holds_int8(ours) == holds_int8(theirs[name]), name
        parts = zip(*((int8_parts(t) if holds_int8(t) else (t,)) for t in (ours, theirs[name])), strict=True)
        assert all(torch.equal(a, b) for a, b in parts), name
        assert ours.dtype == theirs[name].dtype
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name), rtol=0, atol=0, equal_nan=True)


def test_loads_bit_equal_with_no_key_missing_or_unexpected(folder: Path, tmp_path: Path) -> None:
    model = quantised()
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    same(model, again)
    assert torch.equal(logits(again), logits(model))
    assert state_of(again) == state_of(model)
    again.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).stat().st_size == (folder / name).stat().st_size
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert torch.equal(logits(ltepass.lower(again)), logits(ltepass.lower(model)))


def test_the_file_holds_a_byte_a_weight_under_torchaos_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert tensors[f"{UP}qdata"].dtype == torch.int8
    assert tensors[f"{UP}scale"].shape == (120, 1)
    assert not any(name.endswith("proj.weight") for name in tensors)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "torchao"
    assert entry["quant_type"]["default"]["_type"] == "Int8WeightOnlyConfig"
    assert entry["lte"]["quant_method"] == "lte"


def test_another_class_and_dtype_read_it_too(folder: Path) -> None:
    body = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    weight: Any = body.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight.scale, load_file(folder / "model.safetensors")[f"{UP}scale"]), "not rounded"
    assert len(list(routers_of(body))) == 2


class Floats(TorchDispatchMode):
    """The sizes of float tensors that operations gave, off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta and not holds_int8(out):
            self.sizes.add(out.numel())
        return out


def test_no_weight_is_made_in_floats_while_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the check that a gate acts, which runs."""
    monkeypatch.setattr("ltepass.saving.quantizer.try_gates", lambda model, sites: [])
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread
    with Floats() as seen:
        model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {p.numel() for p in model.parameters() if holds_int8(p)}
    assert seen.sizes
    assert not seen.sizes & (weights - {VOCAB * 48}), "the table of tokens is as big as the head"


def test_a_plain_module_saves_and_loads(tmp_path: Path) -> None:
    model = ltepass.quantize(ltepass.transform(Own().eval(), ids(), ltepass.LTEConfig(group_size=4)))
    ltepass.set_mode(model, "hard")
    ltepass.save(model, tmp_path)
    other = Own().eval()
    same(ltepass.load(other, tmp_path), model)
    assert torch.equal(logits(other), logits(model))


def test_removed_it_is_a_dense_model_of_torchao() -> None:
    pytest.importorskip("torchao", reason="transformers asks for the package")
    model = ltepass.remove(quantised())
    quantizer: Any = model.hf_quantizer
    assert quantizer.quantization_config.quant_method == "torchao"


def test_without_ltepass_it_is_torchaos_own(folder: Path) -> None:
    """What transformers' class makes of our entry: ours is one more key, which it takes no notice of."""
    pytest.importorskip("torchao", reason="transformers asks for the package")
    from transformers import TorchAoConfig

    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert TorchAoConfig.from_dict(entry).to_dict()["quant_type"] == entry["quant_type"]


def test_without_torchao_one_line_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(CheckpointError, match=r"hold weights in codes: .*pip install 'ltepass\[quantize\]'"):
        AutoModelForCausalLM.from_pretrained(folder)


BROKEN: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "the scale of .*up_proj.weight .* is missing": lambda t: t.pop(f"{UP}scale"),
    "up_proj.weight' .* is no matrix in codes": lambda t: t.pop(f"{UP}qdata"),
    "the qdata of .*up_proj.weight .* is .'U8'": lambda t: t.update({f"{UP}qdata": t[f"{UP}qdata"].view(torch.uint8)}),
    "the scale of .*up_proj.weight .* is .'F16'": lambda t: t.update({f"{UP}scale": t[f"{UP}scale"].half()}),
    "the scale of .*up_proj.weight .* is .'F32', .120,": lambda t: t.update({f"{UP}scale": t[f"{UP}scale"][:, 0]}),
    "a scale of .*up_proj.weight is not a number": lambda t: t[f"{UP}scale"].fill_(float("inf")),
    "a zero point of .*up_proj.weight is not 0": lambda t: t[f"{UP}zero_point"].fill_(3),
    "no such linear|the model has": lambda t: t.update(
        {f"{UP}{part}": t[f"{UP}{part}"][:60].contiguous() for part in ("qdata", "scale", "zero_point")}
    ),
    "'model.layers.0.mlp.up_proj.weight' .* is no matrix": lambda t: t.update(
        {"model.layers.0.mlp.up_proj.weight": torch.ones(2)}
    ),
    "'model.norm.weight' in codes|the model has": lambda t: t.update(
        {
            "model.norm._weight_qdata": torch.ones(4, 12, dtype=torch.int8),
            "model.norm._weight_scale": torch.ones(4, 1),
            "x.y": t.pop("model.norm.weight"),
        }
    ),
    "down_proj.weight is missing": lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.down_proj" in n],
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_crafted_file_is_refused_in_one_line(words: str, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    BROKEN[words](tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=words) as refused:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_generate_lowers_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> Any:
            from transformers import BatchEncoding

            return BatchEncoding({"input_ids": torch.tensor([[1, 2, 3]])})

        def decode(self, out: torch.Tensor, skip_special_tokens: bool) -> str:
            return str(out.tolist())

    monkeypatch.setattr("ltepass.commands.generate.tokenizer_of", lambda name: Tokenizer())
    model = ltepass.lower(quantised())
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert generate(str(folder), "any", new_tokens=4) == str(expected[0].tolist())
    assert is_quantised(model)


def test_eval_measures_the_codes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltepass.commands.evaluate.tokenizer_of", lambda name: words())
    text = " ".join(f"w{i * i % 60}" for i in range(64))
    (cells,) = evaluate(str(folder), {"text": text}, EvalOptions(length=32)).values()
    blocks = token_blocks(words(), text, 32, 16)
    assert cells["perplexity, hard mode"].value == perplexity(quantised(), blocks)


def test_what_the_server_loads_is_lowered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    from transformers.cli.serving.model_manager import ModelManager

    from ltepass.serving.lowered_server import lowered_as_loaded

    monkeypatch.setattr(ModelManager, "_load_model", lambda self, name: AutoModelForCausalLM.from_pretrained(name))
    with lowered_as_loaded():
        model: Any = ModelManager._load_model(None, folder)
    assert all(router.coded for router in routers_of(model))
    assert torch.equal(logits(model), logits(ltepass.lower(quantised())))
