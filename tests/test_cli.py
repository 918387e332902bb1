"""Each command does what its help says, and an error that a user can put right is one line without a traceback."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from typer.testing import CliRunner

import ltepass
from ltepass.cli import app, main
from ltepass.commands.load import call_by_name, load
from ltepass.corpora import token_blocks
from ltepass.errors import ConfigError
from ltepass.measure.quality import compare, perplexity, repetition
from ltepass.measure.records import TokenRecord, read
from ltepass.measure.sparsity import sparsity_curve
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.report_tables import span
from ltepass.routed.routed import routers_of
from tests.models.zoo import llama, transformed

COMMANDS = {"demo", "inspect", "coverage", "train", "eval", "bench", "export", "generate", "serve", "report"}


MEASURED = ["Training", "Frontier", "Speed"]  # on a report's page


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 36), nn.Linear(36, 12)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


def plain() -> tuple[nn.Module, Any]:
    return nn.Sequential(Plain(), Plain()), (torch.randn(2, 12),)


def no_ffn() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def run(*arguments: str, columns: int = 200) -> str:
    done = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = llama(eos_token_id=None)
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=12, grouping="identity"))
    model.save_pretrained(folder)
    return folder


def test_every_promised_command_is_there_and_has_help() -> None:
    commands = {command.name or getattr(command.callback, "__name__", None) for command in app.registered_commands}
    assert commands | {group.name for group in app.registered_groups} == COMMANDS
    for name in COMMANDS - {"coverage"}:
        shown = run(name, "--help", columns=80)
        assert shown.strip()
        assert name in ("bench", "serve") or f"Example: ltepass {name}" in " ".join(shown.split()), name
    shown = run("serve", "--help")
    assert shown.startswith("ltepass serve MODEL")
    assert "--port" in shown, "the options of transformers' server"
    assert run("--version") == f"ltepass {ltepass.__version__}\n"


@pytest.mark.parametrize("command", [("coverage",), ("bench", "op")], ids=" ".join)
def test_a_command_of_the_workshop_runs_in_a_checkout(
    command: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # the user's folder, not the checkout's
    run(*command, "--help")
    assert "--out" in capfd.readouterr().out
    wrong = CliRunner().invoke(app, [*command, "--no-such-option"])
    assert wrong.exit_code == 2
    assert "No such option" in capfd.readouterr().err


@pytest.mark.parametrize("command", [("coverage", "opt"), ("bench", "op", "--list")], ids=" ".join)
def test_and_says_where_it_is_found_from_a_wheel(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ltepass, "__file__", str(tmp_path / "ltepass" / "__init__.py"))
    monkeypatch.setattr(sys, "argv", ["ltepass", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected a checkout" in line
    assert "examples/" in line


def test_inspect_reads_a_directory_without_weights(tmp_path: Path) -> None:
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    output = run("inspect", str(tmp_path), "--group-size", "12")
    assert "2 FFN sites" in output
    assert "silu" in output


def test_inspect_and_report_show_a_saved_model(saved: Path) -> None:
    for command in ("inspect", "report"):
        done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [command, str(saved)], catch_exceptions=False)
        assert "2 FFN sites" in done.stdout, command
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "site kind activation d_model d_ff group experts mode" in " ".join(done.stdout.split())
        done = CliRunner().invoke(app, [command, str(saved), "--json"])
        assert [site["d_ff"] for site in json.loads(done.stdout)["sites"]] == [60, 60], command


def test_beside_measured_sparsity_names_break_where_they_have_a_dot() -> None:
    model = transformed("llama")
    shares = {site.name: share for site, share in zip(ltepass.report(model).sites, (0.25, 0.75), strict=True)}
    console = Console(width=80, file=io.StringIO())
    console.print(ltepass.report(model, shares))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(line.startswith("model.layers. ") for line in lines), lines
    assert max(map(len, lines)) <= 80
    assert "75.0%" in " ".join(lines)


def test_inspect_calls_a_function_by_name() -> None:
    assert "2 FFN sites" in run("inspect", "tests.test_cli:plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "tests.test_cli:no_ffn"], "NoFFNFoundError"),
        (["inspect", "tests.test_cli:missing"], "cannot be called"),
        (["inspect", "/no/such/folder"], "no model directory"),
        (["report", "/no/such/folder", "--sparsities", "0.3"], "expected --text with it"),
        (["report", "/no/such/folder", "--bench", "/no/such/rows"], "/no/such/rows is not there"),
        (["demo", "--target-sparsity", "1.0"], "--target-sparsity is 1.0"),
        (["demo", "--steps", "0"], "--steps is 0"),
        (["demo", "--model", "gpt9"], "--model is 'gpt9'"),
        (["demo", "--router", "both"], "--router is 'both'"),
    ],
)
def test_what_a_user_can_put_right_is_said_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["ltepass", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_a_function_that_returns_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="returned str"):
        call_by_name("platform:node")


def test_coverage_writes_a_table_and_adds_to_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from examples.coverage.page import page, read_table

    run("coverage", "opt", "--out", str(tmp_path))
    output = capfd.readouterr().out
    assert "opt" in output
    assert "1 causal LMs; 1 instantiate and run; of these 1 have a dense FFN, and 1 (100.0%) get every one" in output
    run("coverage", "gpt2", "nanoGPT style", "--out", str(tmp_path), "--json")
    assert [row["name"] for row in json.loads(capfd.readouterr().out)["rows"]] == ["gpt2", "nanoGPT style"]
    assert [r.name for r in read_table(tmp_path)] == ["gpt2", "opt", "nanoGPT style"]
    written = (tmp_path / "coverage.md").read_text()
    assert "2 causal LMs; 2 instantiate and run" in written
    assert written == page(read_table(tmp_path))


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with a word-level tokenizer, as a user would have it on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dense")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    llama(eos_token_id=None).save_pretrained(folder)
    return folder


def test_generate_goes_on_with_a_dense_model_too(dense_folder: Path) -> None:
    assert "w1 w2 w" in run("generate", str(dense_folder), "w1 w2", "--new-tokens", "3")
    done = CliRunner().invoke(app, ["generate", str(dense_folder), "w1", "--sparsity", "0.5"])
    assert isinstance(done.exception, ConfigError)
    assert "holds no routers" in str(done.exception)


@pytest.mark.parametrize("router", ["linear", pytest.param("proxy", marks=pytest.mark.slow)])
def test_train_eval_and_generate_follow_each_other(dense_folder: Path, tmp_path: Path, router: str) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(800)))
    common = ["--length", "20"]
    options = ["--steps", "4", "--group-size", "12", "--router", router]
    shown = run("train", str(dense_folder), str(text), "--out", str(out), *options, *common)
    assert "trained, sparse" in shown
    assert "not measured" not in shown
    assert "left out of the down projection" not in run("report", str(out))
    shown = run("eval", str(out), str(text), "--limit", "3", *common)
    assert "3 x 20 tokens" in shown
    assert "hard mode" in shown
    assert "w3 " in run("generate", str(out), "w3 w4", "--new-tokens", "5")
    csv, options = tmp_path / "rows.csv", ["--tokens", "12", "--rounds", "1"]
    shown = run("bench", "model", str(out), str(text), *options, "--threads", "1", "--out", str(csv))
    assert "transformers F32" in " ".join(shown.split())
    assert f"{router} router, experts of 12" in " ".join(shown.split())
    assert [(r.side, r.threads, r.sparsity) for r in read(csv, TokenRecord)] == [
        ("transformers", 1, 0.0),
        ("ltepass, dense", 1, 0.0),
        ("ltepass", 1, 0.5),
    ]
    page, given = tmp_path / "page.html", ["--text", str(text), "--sparsities", "0.2,0.8", "--bench", str(csv)]
    run("report", str(out), "--html", str(page), *given, *common)
    headings = re.findall("<h2>(.*?)</h2>", page.read_text())
    used = "Use of experts"
    assert headings == ["Sites", "Sparsity of each layer", "Scores around the threshold", used, *MEASURED]
    assert "ltepass F32 50% sparse, 1 thread" in page.read_text()
    assert "hard mode" not in run("eval", str(dense_folder), str(text), *common)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--against", "vllm"], "--against has 'vllm'; expected some of llama.cpp, onnxruntime"),
        (["--formats", "F32,Q8_0"], "--formats has 'Q8_0'; expected some of F32, BF16, F16"),
        (["--against", "llama.cpp", "--formats", "F32,Q3"], "--formats has 'Q3'; expected some of F32, BF16, Q8_0"),
        (["--against", "llama.cpp", "--device", "cuda"], "compared on the CPU alone"),
        (["--gguf", "m.gguf"], "expected --against llama.cpp with it"),
        (["--threads", "two"], "--threads is 'two'; expected numbers, as 1,2"),
        (["--threads", "0"], "expected 1 or more of each"),
        (["--blocks", "-1"], "--blocks is -1; expected 0 or more"),
        (["--against", "llama.cpp"], "pip install 'ltepass[compare]'"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_one_line_and_status_2(
    options: list[str],
    reason: str,
    dense_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as where it is not installed
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 " * 100)
    monkeypatch.setattr(sys, "argv", ["ltepass", "bench", "model", str(dense_folder), str(text), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert reason in shown
    assert len(shown.splitlines()) == 1


def test_the_size_of_experts_follows_the_router(dense_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(800)))
    sizes = {}
    for router in ([], ["--router", "linear"], ["--router", "proxy"]):
        out, options = (
            tmp_path / "-".join(["out", *router]),
            ["--length", "20", "--steps", "0", "--no-warm-start", *router],
        )
        run("train", str(dense_folder), str(text), "--out", str(out), *options)
        model: Any = load(str(out))
        sizes[model._lte.config["router"], len(router)] = {site.group_size for site in ltepass.report(model).sites}
        assert all(isinstance(r, ProxyRouter) == ("proxy" in router) for r in routers_of(model))
    assert sizes == {("linear", 0): {30}, ("linear", 2): {30}, ("proxy", 2): {1}}
    with pytest.raises(ConfigError, match="router is 'both'; expected one of linear, proxy"):
        run(
            "train",
            str(dense_folder),
            str(text),
            "--out",
            str(tmp_path),
            "--overwrite",
            "--router",
            "both",
            *options[:2],
        )


@pytest.mark.parametrize("start", ["--warm-start", "--no-warm-start"])
def test_without_steps_nothing_is_trained(dense_folder: Path, tmp_path: Path, start: str) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(800)))
    options = ["--length", "20", "--group-size", "12", "--target-sparsity", "0.5", start]
    run("train", str(dense_folder), str(text), "--out", str(out), "--steps", "0", *options)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (dense_folder, out))
    # grouping moves neurons and leaves their values
    moved = {n for n in before if not torch.equal(before[n].flatten().sort().values, after[n].flatten().sort().values)}
    down = {n for n in before if "down_proj" in n}
    assert moved == (down if start == "--warm-start" else set())
    assert {router.mode for router in routers_of(load(str(out)))} == {"hard"}
    assert "hard mode" in run("eval", str(out), str(text), "--length", "20")
    with pytest.raises(ConfigError, match="expected 0"):
        run("train", str(dense_folder), str(text), "--out", str(out), "--steps", "-1", *options)


def test_each_stage_takes_the_steps_that_were_asked_for(
    dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    step = Trainer.training_step

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(self.stage)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", count)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(800)))
    common = [str(dense_folder), str(text), "--out", str(tmp_path / "out"), "--length", "20", "--group-size", "12"]
    run("train", *common, "--steps", "0", "--soft-steps", "2")
    assert taken == ["soft", "soft"]
    run("train", *common, "--steps", "1", "--soft-steps", "1", "--overwrite")
    assert taken[2:] == ["soft", "hard"]
    run("train", *common, "--steps", "0", "--overwrite")
    assert len(taken) == 4


def test_train_takes_the_stages_options_and_eval_shows_the_curve(dense_folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(800)))
    options = ["--length", "20", "--steps", "2", "--soft-steps", "0", "--warm-start", "--trainable", "routers"]
    run("train", str(dense_folder), str(text), "--out", str(out), "--group-size", "12", *options)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (dense_folder, out))
    same = [name for name in before if torch.equal(before[name].sort().values, after[name].sort().values)]
    # grouping permutes the rows of gate and up; the warm start refits down; nothing else but the routers has moved
    assert {name for name in before if name not in same} >= {n for n in before if "down_proj" in n}
    assert all(name in same for name in before if "mlp" not in name)
    shown = run("eval", str(out), str(text), "--length", "20", "--sparsities", "0.2,0.8")
    assert "set_sparsity 0.2" in shown
    assert "set_sparsity 0.8" in shown
    cut = ["--hidden-sparsity", "0.4", "--input-sparsity", "0.3", *options]
    run("train", str(dense_folder), str(text), "--out", str(out / "cut"), "--group-size", "12", *cut)
    shown = run("report", str(out / "cut"))
    assert "the smallest 40% are left out of the down projection" in " ".join(shown.split())
    assert "the smallest 30% of each FFN's inputs are left out of up and gate" in " ".join(shown.split())
    assert all((router.cut or 0) > 0 and (router.input_cut or 0) > 0 for router in routers_of(load(str(out / "cut"))))
    with pytest.raises(ConfigError, match="trainable is 'some'"):
        run("train", str(dense_folder), str(text), "--out", str(out), "--trainable", "some", *options[:2])


def test_eval_compares_with_the_better_dense_model_on_each_text(dense_folder: Path, tmp_path: Path) -> None:
    """Figures are those of the library's calls, and a column's are its own text's."""
    texts = {name: tmp_path / f"{name}.txt" for name in ("own", "other")}
    for stride, path in zip((7, 11), texts.values(), strict=True):
        path.write_text(" ".join(f"w{(i * stride + i // 9) % 61}" for i in range(800)))
    for name, text in texts.items():  # each of them is tuned on one text, so that each is the better one there
        options = [
            "--steps",
            "40",
            "--learning-rate",
            "0.01",
            "--length",
            "20",
            "--target-sparsity",
            "0",
            "--no-warm-start",
        ]
        run(
            "train",
            str(dense_folder),
            str(text),
            "--out",
            str(tmp_path / name / "routed"),
            "--group-size",
            "12",
            *options,
        )
        tuned: Any = ltepass.remove(load(str(tmp_path / name / "routed")))
        tuned.save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    run("train", str(dense_folder), str(texts["own"]), "--out", str(out), "--length", "20", "--steps", "0")
    common = [str(out), str(texts["own"]), "--text", str(texts["other"]), "--length", "20", "--limit", "9"]
    against = [word for name in texts for word in ("--against", str(tmp_path / name))]
    shown = run("eval", *common, *against, "--sparsities", "0.2", "--continuations", "3", columns=400)
    said = CliRunner().invoke(app, ["eval", *common, *against, "--json"], catch_exceptions=False)
    numbers = json.loads(said.stdout)
    rows = {
        cells[1].strip(): cells[2:4] for cells in (line.split("│") for line in shown.splitlines()) if len(cells) > 3
    }
    tokenizer = AutoTokenizer.from_pretrained(out)
    for column, (name, path) in enumerate(texts.items()):
        blocks = token_blocks(tokenizer, path.read_text(), 20, 9)
        model = load(str(out))
        found = compare(model, load(str(tmp_path / name)), blocks)
        dense = f"{found.dense_perplexity:.3f} ({tmp_path / name})"
        shares = ltepass.measure_sparsity(model, blocks[:, None])
        sparsity = span(list(shares.values()))
        ((_, at, _),) = sparsity_curve(model, blocks, [0.2])
        for what, value in {
            "text": "9 x 20 tokens",
            "perplexity, hard mode": f"{found.perplexity:.3f}",
            "perplexity, dense": dense,
            "perplexity over dense, 95 % interval": str(found.ratio),
            "KL(dense || this), nats per token": f"{found.kl:.4f}",
            "same likeliest next token as dense": f"{found.agreement:.1%}",
            "inactive neurons, per site min / mean / max": sparsity,
        }.items():
            assert rows[what][column].strip() == value, (what, name)
        for what, number in {
            "text": {"blocks": 9, "length": 20},
            "perplexity, hard mode": found.perplexity,
            "perplexity over dense, 95 % interval": vars(found.ratio),
            "inactive neurons, per site min / mean / max": shares,
        }.items():
            assert numbers[str(path)][what] == number, (what, name)
        assert rows["set_sparsity 0.2: perplexity, inactive neurons"][column].strip().startswith(f"{at:.3f}, ")
        sides = {"": model, **{f", {tmp_path / side}": load(str(tmp_path / side)) for side in texts}}
        for side, continued in sides.items():
            what = f"repeated 4-grams, 3 greedy continuations of 64 tokens{side}"
            assert rows[what][column].strip() == f"{repetition(continued, blocks[:3], 64):.1%}"
        ltepass.set_mode(model, "dense")
        assert rows["perplexity, every neuron active"][column].strip() == f"{perplexity(model, blocks):.3f}"
    with pytest.raises(ConfigError, match="there are 7 blocks of text, and an interval needs 8"):
        run("eval", *common[:-1], "7", *against)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate DENSE PROMPT", "the prompt '' has no token; expected some text"),
        ("generate DENSE hi --new-tokens 0", "--new-tokens is 0; expected 1 or more"),
        ("train DENSE TEXT --learning-rate nan", "--learning-rate is nan; expected a number above 0"),
        ("train DENSE TEXT --learning-rate 0", "--learning-rate is 0.0; expected a number above 0"),
        ("train ROUTED TEXT --length 20 --out NEW", "holds routers already; expected a dense model"),
        ("train DENSE TEXT --length 20 --out TEXT", "text.txt is a file; expected a folder to write"),
        ("eval DENSE TEXT --length 20 --against ROUTED", "ROUTED holds routers; expected a dense model"),
        ("report DENSE", "is a dense model; expected one with routers, as `ltepass train` writes it"),
        ("report ROUTED --html nowhere/page.html", "nowhere is no folder; expected one that the page"),
        ("generate BARE hi", "has no tokenizer that can be read; expected one beside the model"),
    ],
)
def test_a_mistake_is_a_line_before_any_work(
    arguments: str, words: str, dense_folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 " * 90)
    monkeypatch.setattr("ltepass.commands.train._start", lambda *_: pytest.fail("it began to work"))
    places = {"DENSE": dense_folder, "BARE": saved, "TEXT": text, "NEW": tmp_path / "new", "PROMPT": ""}
    routed = tmp_path / "ROUTED"
    shutil.copytree(saved, routed)
    for file in dense_folder.glob("tokenizer*"):
        shutil.copy(file, routed)
    with pytest.raises(ConfigError, match=re.escape(words)):
        run(*(str({**places, "ROUTED": routed}.get(word, word)) for word in arguments.split()))


def test_the_server_says_at_once_that_there_is_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    monkeypatch.setattr("ltepass.commands.load.look_for_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nothere", "./nothere"):
        with pytest.raises(ConfigError, match="no model directory"):
            run("serve", name, "--port", "0")


def test_too_short_a_text_is_refused_before_anything_is_trained(dense_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3")
    with pytest.raises(ConfigError, match="0 whole blocks of 20 tokens"):
        run("train", str(dense_folder), str(text), "--out", str(tmp_path / "out"), "--length", "20")
    with pytest.raises(ConfigError, match="no whole block of 20 tokens"):
        run("eval", str(dense_folder), str(text), "--length", "20")
    assert not (tmp_path / "out").exists()
