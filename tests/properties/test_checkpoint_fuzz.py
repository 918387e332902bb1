"""A checkpoint that was changed anywhere loads right, or is one CheckpointError: nothing runs, nothing is written.

`pytest --hypothesis-profile=deep tests/properties` tries ten times as many mutants.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ltepass.errors import CheckpointError
from ltepass.routed.sites import FFNSite, LTEState
from ltepass.saving.quantizer import LTEQuantizationConfig, checked_sites
from ltepass.saving.tensor_checks import FLOATS, Header, read_header
from tests.properties.mutants import mutant
from tests.typed import lte_state
from tests.watching import watch

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
FOLDERS = [CHECKPOINTS / v / n for v in ("v1", "v2") for n in ("aligned", "inline", "fused", "encoder_decoder", "cuts")]
FOLDERS += [CHECKPOINTS / "v3" / n for n in ("proxy", "proxy_plain")]
FOLDERS += [CHECKPOINTS / "v4" / "tiers"]
MANY = 12 * settings().max_examples
SOME = settings().max_examples // 2


@dataclass(frozen=True)
class Checkpoint:
    """A fixture's entry and header, and its model on the meta device, which no check may change."""

    model: Any
    entry: dict[str, Any]
    header: Header
    sites: list[FFNSite]


@cache
def checkpoint(folder: Path) -> Checkpoint:
    config = hf.AutoConfig.from_pretrained(folder)
    entry = config.__dict__.pop("quantization_config")
    kind = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    header = read_header([f for f in folder.glob("*.safetensors") if f.name != "expected.safetensors"])
    return Checkpoint(model, entry, header, checked_sites(model, state(entry), header))


def state(entry: Any) -> LTEState:
    return LTEQuantizationConfig.from_dict(copy.deepcopy(entry)).state


def surface(model: torch.nn.Module) -> list[Any]:
    """All that a transform would change."""
    modules = [(name, type(m), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()]
    return [modules, [(name, p.shape, p.dtype) for name, p in model.state_dict().items()]]


def same_gates(sites: list[FFNSite], wanted: list[FFNSite]) -> bool:
    """The same neurons behind the same routers: hooks where a forward could be made are right too, and so is masked."""
    for site, want in zip(sites, wanted, strict=True):
        activation = site.activation if site.activation.startswith("custom") else want.activation
        if site not in (replace(want, activation=activation, kind=kind) for kind in (want.kind, "inline")):
            return False
    return True


def test_mutants_of_the_entry_are_right_or_refused() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=MANY)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        base = checkpoint(data.draw(st.sampled_from(FOLDERS)))
        entry = data.draw(mutant(base.entry))
        before = surface(base.model)
        with watch() as done:
            try:
                sites = checked_sites(base.model, state(entry), base.header)
                seen["right"] += 1
                assert same_gates(sites, base.sites)
            except CheckpointError:
                seen["refused"] += 1
        assert not done
        assert surface(base.model) == before

    one()
    print(dict(seen))
    assert seen.total() >= 1000
    assert min(seen["right"], seen["refused"]) > 20, "both happen"


DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3"])
SHAPES = st.lists(st.sampled_from([0, 1, 5, 12, 24, 60, 101, 10**12]), max_size=3).map(tuple)


@st.composite
def header_mutant(draw: st.DrawFn, header: Header) -> Header:
    header = dict(header)
    name = draw(st.sampled_from(sorted(header)))
    dtype, shape = header.pop(name)
    kind = draw(st.sampled_from(["drop", "rename", "dtype", "shape", "twice"]))
    if kind == "dtype":
        header[name] = (draw(DTYPES), shape)
    elif kind == "shape":
        header[name] = (dtype, draw(SHAPES | st.permutations(shape).map(tuple)))
    elif kind != "drop":
        header[draw(st.sampled_from(sorted(header)) | st.text(max_size=8).map(lambda t: name + t))] = (dtype, shape)
    if kind == "twice":
        header[name] = (dtype, shape)
    return header


def test_mutants_of_a_header_are_right_or_refused() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=MANY // 4)
    @given(st.data())
    def one(data: st.DataObject) -> None:
        base = checkpoint(data.draw(st.sampled_from(FOLDERS)))
        header = data.draw(header_mutant(base.header))
        try:
            assert checked_sites(base.model, state(base.entry), header) == base.sites
            seen["right"] += 1
        except CheckpointError:
            seen["refused"] += 1
            return
        ffn = {rows.param for site in base.sites for rows in site.neurons}
        ours = ffn | {name for name in base.header if "router." in name}
        for name in ours:
            assert header[name][1] == base.header[name][1]
            assert header[name][0] in (FLOATS if name in ffn else [base.header[name][0]])

    one()
    print(dict(seen))
    assert min(seen["right"], seen["refused"]) > 20, "both happen"


def test_files_cut_or_changed_in_any_byte_of_the_header_are_read_or_refused(tmp_path: Path) -> None:
    data = (FOLDERS[0] / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    file = tmp_path / "model.safetensors"

    @settings(max_examples=MANY // 4)
    @given(st.integers(0, end - 1), st.integers(0, 255), st.sampled_from(["byte", "cut", "more"]))
    def one(where: int, byte: int, kind: str) -> None:
        changed = {"byte": data[:where] + bytes([byte]) + data[where + 1 :], "cut": data[:where], "more": data + b"x"}
        file.write_bytes(changed[kind])
        base = checkpoint(FOLDERS[0])
        try:
            checked_sites(base.model, state(base.entry), read_header([file]))
        except CheckpointError:
            return

    one()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()
    yield
    hf.logging.set_verbosity(before)


def load(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits
        return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to change, and beside it a dense one with the same settings."""
    folder = tmp_path_factory.mktemp("lte")
    shutil.copytree(CHECKPOINTS / "v2/aligned", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    dense = folder / "dense"
    dense.mkdir()
    shutil.copy(folder / "model.safetensors", dense)
    (dense / "config.json").write_text(json.dumps(config))
    load(
        dense, torch.arange(3)[None]
    )  # a first load imports the rest of transformers, and torch makes its cache folder
    return folder


def test_whole_folders_load_right_or_are_refused(folder: Path) -> None:
    """from_pretrained and a forward, as a user would."""
    config = json.loads((CHECKPOINTS / "v2/aligned/config.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    seen: Counter[str] = Counter()

    @settings(max_examples=SOME)
    @given(mutant(config["quantization_config"]))
    def one(entry: Any) -> None:
        if (
            not isinstance(entry, dict)
            or entry.get("quant_method") != "lte"
            or {"load_in_8bit", "load_in_4bit"} & {*entry}
        ):
            return  # whose it is, transformers decides
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
        with watch() as done:
            try:
                logits = load(folder, expected["ids"])
                torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
                seen["right"] += 1
            except CheckpointError:
                seen["refused"] += 1
        assert not done, done

    one()
    print(dict(seen))


def _small(config: Any) -> bool:
    """A million layers take transformers as long as it looks."""
    return all(not isinstance(config.get(key), (int, float)) or config[key] < 10**4 for key in config)


def outcome(folder: Path, ids: torch.Tensor) -> str:
    try:
        load(folder, ids)
    except Exception as error:
        return type(error).__name__
    return "loads"


def test_other_settings_fail_as_they_do_for_a_dense_folder(folder: Path) -> None:
    config = json.loads((CHECKPOINTS / "v2/aligned/config.json").read_text())
    entry = config.pop("quantization_config")
    ids = torch.arange(3, 11)[None]

    @settings(max_examples=SOME)
    @given(mutant(config).filter(_small))
    def one(changed: Any) -> None:
        (folder / "dense/config.json").write_text(json.dumps(changed))
        (folder / "config.json").write_text(json.dumps({**changed, "quantization_config": entry}))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {"CheckpointError", outcome(folder / "dense", ids)}
            # FFNs wider than the entry has them are what `prune` writes: they load, as narrow as they were saved.
            width = hf.LlamaConfig(**changed).intermediate_size if "RuntimeError" in expected else None
            if isinstance(width, int) and width > config["intermediate_size"]:
                expected.add("loads")
            assert outcome(folder, ids) in expected

    one()


def test_payload_bytes_never_crash(tmp_path: Path) -> None:
    """Weights may hold anything; an order that is none and a threshold that is no number are refused."""
    shutil.copytree(CHECKPOINTS / "v2/aligned", tmp_path, dirs_exist_ok=True)
    data = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    spans = [v["data_offsets"] for k, v in sorted(header.items()) if "router." in k]
    ids = torch.arange(3, 11)[None]
    seen: Counter[str] = Counter()

    @settings(max_examples=SOME)
    @given(st.sampled_from([*spans, [0, len(data) - start]]), st.binary(min_size=8, max_size=64), st.floats(0, 0.999))
    def one(span: list[int], noise: bytes, at: float) -> None:
        first = start + span[0] + int(at * (span[1] - span[0]))
        noise = noise[: start + span[1] - first]
        (tmp_path / "model.safetensors").write_bytes(data[:first] + noise + data[first + len(noise) :])
        try:
            model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        except CheckpointError:
            seen["refused"] += 1
            return
        model(input_ids=ids)
        seen["loads"] += 1
        for site in lte_state(model).sites:
            order = model.get_submodule(site.router).permutation
            assert sorted(order.tolist()) == list(range(site.d_ff))

    one()
    assert seen["refused"] > 0
    assert seen["loads"] > 0
