"""--json prints one object and nothing else; lm-eval's tasks pass through; long steps show their time left."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from examples.bench import op
from ltepass.cli import app, main, progress_bars
from ltepass.cli.output_and_errors import show
from ltepass.progress import heard_by, steps, tell


@dataclass(frozen=True)
class Figures:
    share: float = math.nan
    name: str = "x"


def said(*arguments: str) -> Any:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_what_no_json_has_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    show({"rows": [Figures(), Figures(0.5)], 3: (math.inf, Path("a"))}, json=True)
    rows = [{"share": None, "name": "x"}, {"share": 0.5, "name": "x"}]
    assert json.loads(capsys.readouterr().out) == {"rows": rows, "3": [None, "a"]}


@pytest.mark.parametrize(
    ("arguments", "worker", "found", "shown"),
    [
        (["export", "m", "out"], "ltepass.commands.export.export", {"folder": "out", "bytes": 3}, None),
        (["bench", "model", "m", __file__], "ltepass.commands.bench.bench", [Figures()], {"rows": [Figures()]}),
        (["demo"], "ltepass.demo.run.run_demo", {"stages": {}}, None),
    ],
    ids=["export", "bench model", "demo"],
)
def test_stdout_is_the_results_alone(
    arguments: list[str], worker: str, found: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: object, console: Any = None, **kwargs: object) -> Any:
        print("what a library prints")
        if console is not None:
            console.print("what the demo says")
        return found

    monkeypatch.setattr(worker, work)
    expected = {"rows": [{"share": None, "name": "x"}]} if shown else found
    assert said(*arguments, "--json") == expected


def test_the_cases_of_bench_op_too() -> None:
    program = typer.Typer()
    program.command()(op.main)
    done = CliRunner().invoke(program, ["7b-*", "--list", "--json"], catch_exceptions=False)
    assert all(name.startswith("7b-") for name in json.loads(done.stdout)["cases"])


class Words(str):
    """A tokenizer, for who only hands it on."""

    eos_token_id: int | None = 0


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The three names of lm-eval 0.4.13 that are called, and what they were called with."""
    asked: dict[str, Any] = {"models": []}

    class HFLM:
        def __init__(self, **kwargs: Any) -> None:
            asked["models"].append(kwargs)

    class TaskManager:
        def __init__(self, include_path: Path | None = None) -> None:
            asked["include"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name in ("arc", "words")]

    def simple_evaluate(**kwargs: Any) -> dict[str, Any]:
        asked.update(kwargs)
        print("lm-eval prints")
        share = 0.5 / len(asked["models"])
        figures = {"alias": "arc", "acc,none": share, "acc_stderr,none": 0.1, "sample_len": 3}
        return {"results": {"arc": figures}, "config": {}}

    modules: dict[str, dict[str, object]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("ltepass.commands.tasks.load", lambda name, device: f"model {name} {device}")
    monkeypatch.setattr("ltepass.commands.tasks.tokenizer_of", lambda name: Words(f"tokenizer {name}"))
    return asked


def test_tasks_pass_through_to_lm_eval(lm_eval: dict[str, Any], tmp_path: Path) -> None:
    options = ["--against", "dense", "--shots", "2", "--limit", "7", "--batch", "4", "--include", str(tmp_path)]
    found = said("eval", "routed", "--tasks", "arc,words", *options, "--json")
    assert [model["pretrained"] for model in lm_eval["models"]] == ["model routed cpu", "model dense cpu"]
    assert [model["tokenizer"] for model in lm_eval["models"]] == ["tokenizer routed", "tokenizer dense"]
    assert {model["batch_size"] for model in lm_eval["models"]} == {4}
    assert (lm_eval["tasks"], lm_eval["num_fewshot"], lm_eval["limit"]) == (["arc", "words"], 2, 7)
    assert lm_eval["include"] == tmp_path
    assert {name: model["arc"]["acc,none"] for name, model in found.items()} == {"routed": 0.5, "dense": 0.25}
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["eval", "routed", "--tasks", "arc"], catch_exceptions=False)
    (row,) = [line for line in done.stdout.splitlines() if "arc" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["arc", "acc", "0.1667 ± 0.1000"]
    assert lm_eval["limit"] is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tasks", "arc,poems"], "lm-eval has no task 'poems'"),
        ([], "expected a text, or --tasks, and not both"),
        ([__file__, "--tasks", "arc"], "expected a text, or --tasks, and not both"),
        ([__file__, "--sparsities", "half"], "--sparsities is 'half'; expected numbers"),
        (["--tasks", "arc", "--include", "nowhere"], "--include is nowhere; expected a folder of tasks"),
        (["--tasks", "arc", "--sparsities", "0.3"], "--sparsities was given with --tasks; expected it with a text"),
        (["--tasks", "arc", "--length", "20"], "--length was given with --tasks; expected it with a text"),
        ([__file__, "--shots", "0"], "--shots was given with a text; expected it with --tasks"),
    ],
)
def test_what_eval_cannot_do_is_one_line_and_status_2(
    arguments: list[str], reason: str, lm_eval: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert reason in refused("eval", "routed", *arguments, patch=monkeypatch, capsys=capsys)
    assert not lm_eval["models"], "before a model is loaded"


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused("eval", "routed", "--tasks", "arc", patch=monkeypatch, capsys=capsys)
    assert "pip install 'ltepass[eval]'" in line


def test_a_tokenizer_without_an_end_is_named(
    lm_eval: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Words, "eos_token_id", None)
    line = refused("eval", "routed", "--tasks", "arc", patch=monkeypatch, capsys=capsys)
    assert "the tokenizer of routed has no eos token" in line


def refused(*arguments: str, patch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one line on stderr."""
    patch.setattr(sys, "argv", ["ltepass", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return str(line)


@pytest.mark.parametrize("command", ["inspect", "report", "train", "eval", "generate", "export", "bench", "demo"])
def test_a_device_or_a_text_or_a_model_that_is_not_there_is_one_line_and_status_2(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    none, latin, text = str(tmp_path / "none"), tmp_path / "latin.txt", tmp_path / "text.txt"
    (tmp_path / "nomodel").mkdir()
    (tmp_path / "nomodel" / "config.json").write_text("{}")
    nomodel = str(tmp_path / "nomodel")
    latin.write_bytes("ä".encode("latin-1"))
    text.write_text("w1 w2")
    out = ["--out", str(tmp_path / "out")]
    cases: dict[str, list[tuple[list[str], str]]] = {
        "inspect": [([none], "no model directory")],
        "report": [([none], "no model directory")],
        "train": [
            ([none, str(text), *out], "no model directory"),
            ([none, str(text), "--device", "xla", *out], "--device"),
            ([none, str(text), "--target-sparsity", "1.5", *out], "target_sparsity is 1.5"),
        ],
        "eval": [([none, str(latin)], "no UTF-8"), ([none, none], "cannot be read"), ([none, str(text)], "no model")],
        "generate": [([none, "w1"], "no model directory"), ([none, "w1", "--device", "xla"], "--device is 'xla'")],
        "export": [([name, str(tmp_path / "out")], "no model directory") for name in (none, nomodel)],
        "bench": [(["model", none, str(latin)], "no UTF-8"), (["model", none, str(text)], "no model directory")],
        "demo": [(["--device", "xla", *out], "--device is 'xla'")],
    }
    for arguments, reason in cases[command]:
        assert reason in refused(command, *arguments, patch=monkeypatch, capsys=capsys), arguments
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["report", "eval", "generate", "export", "bench"])
def test_a_training_that_was_stopped_is_named(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "stopped" / "training").mkdir(parents=True)
    folder, text = str(tmp_path / "stopped"), tmp_path / "text.txt"
    text.write_text("w1 w2")
    words = {"report": [folder], "export": [folder, str(tmp_path / "out")], "bench": ["model", folder, str(text)]}
    said = refused(command, *words.get(command, [folder, str(text)]), patch=monkeypatch, capsys=capsys)
    assert "a training that has not ended; run the same `ltepass train` again" in said


def test_steps_are_told_as_they_are_done() -> None:
    heard: list[tuple[str, int, int]] = []
    with heard_by(lambda *step: heard.append(step)):
        assert list(steps("three", "abc")) == ["a", "b", "c"]
        assert heard == [("three", n, 3) for n in (0, 1, 2, 3, 3)]
        heard.clear()
        for _ in steps("left", range(9)):
            break
        assert heard[-1] == ("left", 9, 9), "a loop that was left is over"
        heard.clear()
        assert list(steps("unknown", iter("ab"))) == ["a", "b"]
        assert list(steps("one", "a")) == ["a"]
    list(steps("nobody hears it", "abc"))
    assert heard == []


def test_a_terminal_gets_bars_and_a_file_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with progress_bars.progress_bars():
            for _ in steps("outer", range(3)):
                tell("inner", 1, 2)
                tell("inner", 2, 2)

    work()
    assert capsys.readouterr().err == "", "what is quick needs no line"
    monkeypatch.setattr(progress_bars, "SECONDS", 0.0)
    work()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "outer" in line] == [f"outer: {n} of 3, about 0 s left" for n in (1, 2)]
    monkeypatch.setenv("FORCE_COLOR", "1")
    work()
    shown = capsys.readouterr()
    assert "━" in shown.err
    assert "2/3" in shown.err
    assert shown.out == ""
