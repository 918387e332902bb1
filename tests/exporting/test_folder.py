"""An exported folder decodes what transformers' `generate` does: in our loop, in the example's, in C++."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

import ltepass
from examples.bench import token_profile
from ltepass.commands.generate import generate as command
from ltepass.errors import ConfigError, ExportError
from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.kernels.cpu import build
from ltepass.measure.records import TokenRecord, read
from tests.child import ROOT, environment
from tests.models.zoo import VOCAB, transformed

PROMPT, NEW = [5, 17, 9, 33, 21], 12
EXAMPLES = ROOT / "examples" / "exported"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: Any) -> tuple[Path, Path, list[int]]:
    """A saved sparse model with a tokenizer of words, its exported folder, and what `generate` says. Compiled once."""
    base = tmp_path_factory.mktemp("exported")
    model: Any = transformed("llama", num_key_value_heads=1)
    ltepass.calibrate(model, [torch.randint(0, VOCAB, (4, 32))])
    ltepass.set_sparsity(model, 0.5)
    asked = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    expected = asked[0, len(PROMPT) :].tolist()
    assert len(expected) < NEW, "these weights come to an end token"
    assert expected[-1] == 2
    model.save_pretrained(base / "saved")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(base / "saved")
    said = run(["-m", "ltepass", "export", base / "saved", base / "out", "--length", "128", "--json"])
    (base / "said.json").write_text(said)
    return base / "saved", base / "out", expected


def run(words: list[Any], **env: str) -> str:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=280, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_the_command_says_what_it_wrote(exported: Any) -> None:
    saved, folder, _ = exported
    said = json.loads((saved.parent / "said.json").read_text())
    about = json.loads((folder / "decoder.json").read_text())
    assert said["folder"] == str(folder)
    assert said["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert (said["token_bytes"], said["gated_bytes"]) == (about["token_bytes"], about["gated_bytes"])


def test_our_loop_says_what_generate_says_and_again_after_a_reset(exported: Any) -> None:
    _, folder, expected = exported
    decoder = ExportedDecoder(folder)
    assert decoder.length == 128
    for _ in range(2):
        decoder.cache.fill_(torch.nan)  # what no token has written is never read
        assert list(decoder.generate(PROMPT, NEW)) == expected
    decoder.reset()
    one_by_one = [int(decoder([token]).argmax()) for token in PROMPT]
    assert one_by_one[-1] == expected[0], "a prompt through the decode step"


def test_a_token_asks_no_op_for_its_rule_of_autograd(exported: Any) -> None:
    decoder, called = ExportedDecoder(exported[1]), []
    decoder(PROMPT)
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        decoder([1])
    finally:
        sys.setprofile(None)
    assert len(called) > 1, "the decoder's own frames are seen"
    assert not [name for name in called if "kernels" in Path(name).parts], "10 us a call, a hundred times a token"


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_generate_says_the_same_with_the_folder_in_the_models_place(exported: Any, asked: dict[str, Any]) -> None:
    saved, folder, _ = exported
    model: Any = AutoModelForCausalLM.from_pretrained(saved)
    ltepass.set_mode(model, "hard")
    decoder_calls: list[int] = []
    theirs, ours, outs = Heard(), Heard(), []
    loop = ltepass.exported_loop(folder, streamer=ours)
    watched = pytest.MonkeyPatch()
    call = ExportedDecoder.__call__

    def seen(self: ExportedDecoder, ids: list[int]) -> torch.Tensor:
        decoder_calls.append(len(ids))
        return call(self, ids)

    watched.setattr(ExportedDecoder, "__call__", seen)
    for custom in (None, loop, loop):
        torch.manual_seed(3)
        ids = torch.tensor([PROMPT])
        more = {"max_new_tokens": NEW, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        more |= {"custom_generate": custom} if custom else {"streamer": theirs}
        outs.append(model.generate(ids, **more, **asked))
    watched.undo()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2]), "and from the beginning again"
    assert ours.tokens == 2 * theirs.tokens
    assert ours.ended
    assert decoder_calls[:2] == [len(PROMPT), 1]


class Heard(BaseStreamer):  # type: ignore[misc]  # transformers leaves it untyped
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, "2 sequences"),
        ({"num_return_sequences": 3, "do_sample": True}, "3 sequences"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "padding"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(exported: Any, asked: dict[str, Any], words: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(exported[0])
    call = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "max_new_tokens": 2, "pad_token_id": 0, **asked}
    with pytest.raises(ConfigError, match=words):
        model.generate(custom_generate=ltepass.exported_loop(exported[1]), **call)


def test_a_full_cache_ends_it_and_more_is_refused(exported: Any) -> None:
    decoder = ExportedDecoder(exported[1])
    decoder.about = replace(decoder.about, eos=[])
    assert len(list(decoder.generate(PROMPT, 1000))) == 128 - len(PROMPT) + 1
    with pytest.raises(ExportError, match="1 tokens behind 128 of a cache of 128"):
        decoder([1])
    decoder.reset()
    with pytest.raises(ExportError, match="129 tokens behind 0"):
        decoder([1] * 129)
    with pytest.raises(ExportError, match="at least 1"):
        decoder([])


def test_the_command_generates_from_the_folder(exported: Any) -> None:
    _, folder, expected = exported
    said = run(["-m", "ltepass", "generate", folder, text(PROMPT), "--new-tokens", NEW, "--exported"])
    assert said.strip() == text(PROMPT + expected)


def test_no_exported_code_runs_where_a_checkpoint_was_meant(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("machine code was loaded")

    monkeypatch.setattr("torch._inductor.aoti_load_package", load)
    saved, folder, expected = exported
    with pytest.raises(ConfigError, match="holds machine code; where you trust it, add --exported"):
        command(str(folder), "w1")
    shutil.copytree(folder, tmp_path / "both")
    shutil.copytree(saved, tmp_path / "both", dirs_exist_ok=True)
    assert command(str(tmp_path / "both"), text(PROMPT), new_tokens=NEW) == text(PROMPT + expected)


def test_the_loop_without_ltepass_says_the_same(exported: Any) -> None:
    _, folder, expected = exported
    blocked = "import sys; sys.modules['ltepass'] = None; sys.modules['transformers'] = None; "
    program = f"{blocked} sys.argv = {['x', str(folder), text(PROMPT), str(NEW)]!r}; import runpy; "
    said = run(["-c", f"{program} runpy.run_path({str(EXAMPLES / 'generate.py')!r})"])
    assert said.strip() == text(PROMPT + expected)


def test_the_program_in_cpp_says_the_same(exported: Any, tmp_path: Path) -> None:
    _, folder, expected = exported
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [*build.compile_command(), "-std=c++20", "-O0", str(EXAMPLES / "generate.cpp")]
    command += ["-o", str(tmp_path / "generate"), *include, *link]
    subprocess.run(command, check=True, timeout=280)
    words = [str(tmp_path / "generate"), str(folder), str(NEW), *map(str, PROMPT)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert [int(word) for word in done.stdout.split()] == expected


def test_examples_are_as_short_as_they_say() -> None:
    assert len((EXAMPLES / "generate.py").read_text().splitlines()) <= 30
    assert len((EXAMPLES / "generate.cpp").read_text().splitlines()) <= 65


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("format", 2, "has format 2; this version reads 1"),
        ("torch", "2.0.0", "compiled for torch 2.0.0"),
        ("isa", "sapphire", "compiled for sapphire"),
        ("extra", 1, "no folder that"),
    ],
)
def test_a_folder_of_another_machine_or_version_is_refused(
    exported: Any, tmp_path: Path, entry: str, value: object, words: str
) -> None:
    about = json.loads((exported[1] / "decoder.json").read_text())
    (tmp_path / "decoder.json").write_text(json.dumps({**about, entry: value}))
    with pytest.raises(ExportError, match=words):
        ExportedDecoder(tmp_path)


def test_what_is_no_folder_of_ours_is_refused(exported: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no folder that"):
        ExportedDecoder(tmp_path)
    shutil.copytree(exported[1], tmp_path / "cut")
    whole = (tmp_path / "cut" / "weights.pt").read_bytes()
    (tmp_path / "cut" / "weights.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=r"weights\.pt cannot be read"):
        ExportedDecoder(tmp_path / "cut")


@pytest.mark.slow  # a process for each side, a minute in all; test_step.py counts the same bytes
def test_the_benchmark_times_it_beside_the_model_that_it_was_made_of(exported: Any, tmp_path: Path) -> None:
    saved, folder, _ = exported
    (tmp_path / "text").write_text(text([3 + (i * 7 + i // 9) % (VOCAB - 3) for i in range(100)]))
    options = ["--tokens", "12", "--rounds", "1", "--threads", "1", "--out", tmp_path / "rows.csv"]
    run(["-m", "ltepass", "bench", "model", saved, tmp_path / "text", "--exported", folder, *options])
    rows = {row.side: row for row in read(tmp_path / "rows.csv", TokenRecord)}
    ours, eager = rows["ltepass, exported"], rows["ltepass"]
    assert (ours.format, ours.head, ours.sparsity, ours.group_size) == ("F32", "F32", 0.5, eager.group_size)
    assert ours.perplexity == pytest.approx(eager.perplexity, rel=1e-3)
    assert ours.weight_mb == pytest.approx(eager.weight_mb, rel=0.01), "counted in the graph, and in the modules"
    assert ours.kv_mb == pytest.approx(eager.kv_mb)
    assert 0 < ours.ms < eager.ms


def test_the_profile_says_where_a_token_goes(exported: Any, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        options = ["--threads", "1", "--tokens", "4", "--rounds", "2"]
        token_profile.main([str(exported[1]), *options, "--out", str(tmp_path / "rows.csv")])
    finally:
        torch.set_num_threads(before)
    (row,) = read(tmp_path / "rows.csv", token_profile.ProfileRecord)
    assert (row.calls, row.tokens) == (2 * 4 + 1, 8), "qkv, attention, output and FFN of two layers, and the head"
    assert 0 < row.weights_ms < row.ms
    assert row.ms == pytest.approx(row.weights_ms + row.attention_ms + row.between_ms, rel=0.01)


def test_what_an_exported_folder_cannot_do_is_refused(exported: Any) -> None:
    with pytest.raises(ConfigError, match="exported with"):
        command(str(exported[1]), "w1", sparsity=0.5, exported=True)
    with pytest.raises(ConfigError, match="runs on the CPU"):
        command(str(exported[1]), "w1", device="cuda", exported=True)


def change_json(folder: Path, **entries: Any) -> None:
    about = json.loads((folder / "decoder.json").read_text())
    (folder / "decoder.json").write_text(json.dumps({**about, **entries}))


def change_weights(folder: Path, change: Callable[[Any], Any]) -> None:
    torch.save(change(torch.load(folder / "weights.pt", weights_only=True)), folder / "weights.pt")


def one_changed(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The first matrix."""

    def changed(state: dict[str, torch.Tensor]) -> dict[str, object]:
        name = next(name for name, tensor in state.items() if tensor.dim() == 2)
        return {**state, name: change(state[name])}

    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: change_weights(d, lambda w: dict(list(w.items())[1:])), "is missing"),
        (lambda d: change_weights(d, one_changed(lambda t: t[:1].clone())), "weights.pt: "),
        (lambda d: change_weights(d, one_changed(lambda t: t.half())), "is torch.float16"),
        (lambda d: change_weights(d, one_changed(lambda t: t.t().contiguous().t())), "strides"),
        (lambda d: change_weights(d, one_changed(lambda t: "text")), "no tensors by name"),
        (lambda d: change_weights(d, lambda w: [*w.values()]), "no tensors by name"),
        (lambda d: (d / "weights.pt").write_bytes(b""), "cannot be read"),
        (lambda d: (d / "decode.pt2").write_bytes((d / "decode.pt2").read_bytes()[:5000]), "cannot be read"),
        (lambda d: (d / "prefill.pt2").unlink(), "cannot be read"),
        (lambda d: change_json(d, cache=[2, 2, 1, 1, 4096, 6]), "another export"),
        (lambda d: change_json(d, cache_dtype="bfloat16"), "another export"),
        (lambda d: change_json(d, eos=[3]), "another export"),
        (lambda d: change_json(d, cache_dtype="ones"), "no folder that"),
        (lambda d: change_json(d, eos="2"), "no folder that"),
        (lambda d: (d / "decoder.json").write_text("[" * 100_000), "no folder that"),
        (lambda d: (d / "decoder.json").write_text("[1]"), "no folder that"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    exported: Any, tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    shutil.copytree(exported[1], tmp_path / "changed")
    change(tmp_path / "changed")
    with pytest.raises(ExportError, match=says):
        ExportedDecoder(tmp_path / "changed")


def test_the_folder_may_move(exported: Any) -> None:
    assert b"/kernels.so" not in (exported[1] / "ops.so").read_bytes(), "found beside it, wherever that is"


def test_an_export_that_ends_half_way_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(_: object, target: Path, __: object) -> set[str]:
        target.write_bytes(b"new")
        return set()

    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltepass.exporting.export_model._compile", compiled)
    monkeypatch.setattr("ltepass.exporting.export_model.write_ops", stopped)
    for name in ("decode.pt2", "decoder.json"):
        (tmp_path / name).write_text("old")
    with pytest.raises(KeyboardInterrupt):
        ltepass.export(transformed("llama"), tmp_path, length=16)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        ("decode.pt2", "decoder.json"), "old"
    )
    monkeypatch.setattr("ltepass.exporting.export_model.write_ops", lambda _: None)
    ltepass.export(transformed("llama"), tmp_path, length=16)
    assert (tmp_path / "decode.pt2").read_bytes() == b"new"
    assert json.loads((tmp_path / "decoder.json").read_text())["cache"][4] == 16
