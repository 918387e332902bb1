"""`ltepass train`: what it reads, what it refuses, and that a call which was cut goes on to the same bits."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer
from typer.testing import CliRunner

from ltepass.cli import app, main
from ltepass.commands.train import Keeping, TrainOptions, train
from ltepass.commands.training_data import read_rows, tokenised
from ltepass.errors import ConfigError, GroupSizeError
from ltepass.routed.token_masks import IGNORED
from tests.models.zoo import llama
from tests.training.test_robust import drive

WORDS = " ".join(f"w{(i * 7 + i // 9) % 61}" for i in range(400))
OPTIONS = TrainOptions(length=20, group_size=12, grouping="identity", steps=5, warm_start=False)
TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w60")


@pytest.fixture(scope="module")
def dense(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tokenizer.save_pretrained(folder)
    llama(eos_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(WORDS)
    return file


def weights(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


class CutError(BaseException):
    """As a kill is: nothing of ours catches it."""


def test_a_call_that_was_cut_goes_on_to_the_same_bits(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(str(dense), str(text), tmp_path / "whole", OPTIONS, Keeping(save_every=2))
    assert not list((tmp_path / "whole/training").glob("hard*"))
    step, taken = Trainer.training_step, list[int]()

    def cut(self: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if len(taken) == 3:
            raise CutError
        taken.append(self.state.global_step)
        loss: torch.Tensor = step(self, *args, **kwargs)
        return loss

    out, keeping = tmp_path / "cut", Keeping(save_every=2)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", cut)
        with pytest.raises(CutError):
            train(str(dense), str(text), out, OPTIONS, keeping)
        taken[:] = [0, 0]  # the next call is cut in its second step, and has to have gone on from the checkpoint
        with pytest.raises(CutError):
            train(str(dense), str(text), out, OPTIONS, keeping)
    assert taken == [0, 0, 2]
    again = train(str(dense), str(text), out, OPTIONS, Keeping(resume=True))
    assert weights(out) == weights(tmp_path / "whole")
    assert again["perplexity"] == whole["perplexity"]
    heard: list[str] = []
    assert train(str(dense), str(text), out, OPTIONS, keeping, heard.append) == again
    assert heard == [f"{out} holds this training, finished; --overwrite trains anew"]


@pytest.mark.slow
@pytest.mark.timeout(5000)  # beyond the driver's, which says what it was doing
def test_the_command_killed_at_random_moments_ends_with_the_same_weights(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    """From its first moment to its last: while it fits routers, trains, writes a checkpoint or the model, measures."""
    n = 20
    options = ["--length", "20", "--group-size", "12", "--steps", "5", "--soft-steps", "4", "--save-every", "2"]
    arguments = [str(dense), str(text), *options]
    shown = drive("kill_command_driver", tmp_path, str(n), *arguments, timeout=600 + 200 * n)
    print(shown)
    assert {weights(tmp_path / f"random {i}") for i in range(n)} == {weights(tmp_path / "whole")}
    results = [json.loads((tmp_path / f"random {i}/training/run.json").read_text())["result"] for i in range(n)]
    assert len({result["perplexity"] for result in results}) == 1


def test_a_folder_of_something_else_is_refused_and_overwritten_where_asked(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    def run(out: Path, options: TrainOptions, *, resume: bool = False, overwrite: bool = False) -> None:
        train(str(dense), str(text), out, options, Keeping(resume=resume, overwrite=overwrite))

    short, longer = (TrainOptions(length=20, group_size=12, steps=0, warm_start=False, seed=seed) for seed in (0, 1))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="holds no training to resume"):
        run(out, short, resume=True)
    assert not out.exists()
    with pytest.raises(GroupSizeError):
        run(out, TrainOptions(length=20, group_size=7, steps=0))
    run(out, short)  # what failed before its first step binds nobody
    before = weights(out)
    with pytest.raises(
        ConfigError, match=r"holds a training with seed 0 \(now 1\); pass another --out, or --overwrite"
    ):
        run(out, longer)
    with pytest.raises(ConfigError, match="expected one of them"):
        run(out, short, resume=True, overwrite=True)
    assert weights(out) == before
    run(out, longer, overwrite=True)
    assert json.loads((out / "training/run.json").read_text())["asked"]["seed"] == 1
    (out / "training/run.json").write_text("{}")
    with pytest.raises(ConfigError, match="no record of a training"):
        run(out, longer)
    with pytest.raises(ConfigError, match=r"no `ltepass train` wrote it"):
        run(dense, short)


def rows_of(kind: str) -> list[dict[str, object]]:
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    rows: dict[str, list[dict[str, object]]] = {
        "text": [{"text": "w5 w6"}, {"text": "w7"}],
        "prompt": [{"prompt": "w5 w6", "completion": "w7"}],
        "turns": [{"prompt": turns[:1], "completion": turns[1:]}],
        "messages": [{"messages": turns}],
    }
    return rows[kind]


@pytest.mark.parametrize("kind", ["text", "prompt", "turns", "messages"])
@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "splits", "files"])
def test_every_kind_of_row_is_read_from_every_form(kind: str, form: str, tmp_path: Path) -> None:
    rows, file = rows_of(kind), tmp_path / f"rows.{form}"
    data = Dataset.from_list(rows)
    if form == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif form == "parquet":
        data.to_parquet(file)
    elif form == "saved":
        data.save_to_disk(file)
    elif form == "splits":
        DatasetDict({"train": Dataset.from_list([{"text": "no"}]), "mine": data}).save_to_disk(file)
    else:
        file.mkdir()
        (file / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read_rows(str(file), "mine" if form == "splits" else "train") == rows


def test_rows_become_blocks_of_what_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    with_template = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="w0", eos_token="w60", chat_template=TEMPLATE
    )
    expected = {
        "prompt": ([5, 6, 7, 60, 0, 0], 2, 4),
        "turns": ([1, 5, 6, 1, 7, 0], 4, 5),  # the template's own words before the answer are given
        "messages": ([1, 5, 6, 1, 7, 0], 0, 5),
    }
    for kind, (ids, given, end) in expected.items():
        columns = tokenised(rows_of(kind), with_template, 6)
        assert columns["input_ids"].tolist() == [ids], kind
        assert columns["attention_mask"].tolist() == [[1] * end + [0] * (6 - end)], kind
        labels = [i if given <= at < end else IGNORED for at, i in enumerate(ids)]
        assert columns["labels"].tolist() == [labels], kind
    assert tokenised(rows_of("prompt"), with_template, 2)["labels"].shape == (0, 2)  # nothing is left to learn
    columns = tokenised(rows_of("text"), with_template, 2)
    assert columns["input_ids"].tolist() == [[5, 6], [60, 7]]
    assert columns.keys() == {"input_ids", "labels"}
    with pytest.raises(ConfigError, match="no chat template"):
        tokenised(rows_of("messages"), tokenizer, 6)
    with pytest.raises(ConfigError, match="two kinds"):
        tokenised([{"prompt": "w1", "completion": []}], tokenizer, 6)


def test_padded_rows_train_and_are_measured(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "w1 w2 w3", "completion": " ".join(f"w{i}" for i in range(4, 16))}
    file.write_text("\n".join([json.dumps(row)] * 12))
    arguments = ["train", str(dense), str(file), "--out", str(tmp_path / "out"), "--length", "20", "--steps", "1"]
    done = CliRunner().invoke(app, [*arguments, "--group-size", "12", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["held_out"] == "1 x 20 tokens"
    assert found["perplexity"] > 1
    assert set(found["tokens_per_s"]) == {"dense", "lowered"}


BAD = {
    "missing.txt": (None, "cannot be read: No such file"),
    "no/such/place": (None, "cannot be read: No such file"),
    "latin.txt": ("ä".encode("latin-1"), "is no UTF-8 text"),
    "a.jsonl": (b'{"text": "a"}\n{"text"', "line 2 of"),
    "b.jsonl": (b"7", "is 7; expected an object a line"),
    "c.jsonl": (b'{"body": "a"}', "has the columns body; expected text, or prompt and completion, or messages"),
    "d.jsonl": (b'{"text": "a"}\n{"text": 3}', "text of row 2"),
    "e.jsonl": (b"", "has no rows"),
    "f.parquet": (b"PAR", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_and_status_2(
    name: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, reason = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    arguments = ["train", str(dense), str(tmp_path / name), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["ltepass", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert reason in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--steps", "-1"], "steps is -1"),
        (["--length", "0"], "--length is 0"),
        (["--save-every", "0"], "--save-every is 0"),
        (["--trainable", "some"], "trainable is 'some'"),
        (["--device", "cuda", "--length", "20"], "torch finds no such device here"),
        (["--device", "abacus", "--length", "20"], "--device is 'abacus'"),
        (["--out", "/dev/null/out", "--length", "20"], "Not a directory"),
    ],
)
def test_an_option_that_is_wrong_is_one_line_and_status_2(
    options: list[str],
    reason: str,
    dense: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    out = ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["ltepass", "train", str(dense), str(text), *out, *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
