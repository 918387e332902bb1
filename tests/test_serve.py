"""`ltepass serve`: transformers' own server loads a saved model, lowers it, and answers as the model does by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from tests.serving import CHAT, ask, save_model, serving

# The command, with the op's calls counted: what it answers must come from the lowered model.
COUNTING = """
import atexit, pathlib, sys
from ltepass.passes.lower import lowered_forward
from ltepass.cli import main
file, op, calls = pathlib.Path(sys.argv.pop(1)), lowered_forward.routed_ffn, []
lowered_forward.routed_ffn = lambda *a: (calls.append(1), op(*a))[1]
atexit.register(lambda: file.write_text(str(len(calls))))
main()
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_the_server_answers_with_the_lowered_model(saved: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "w1 w2 w3"}
    asked = {"model": str(saved), "messages": [question], "max_tokens": 5, "temperature": 0}
    with serving(saved, tmp_path / "log.txt", ("-c", COUNTING, str(tmp_path / "calls"))) as port:
        answer = json.loads(ask(port, CHAT, asked)[1])["choices"][0]["message"]["content"]
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=60)[0, 3:]
    assert answer.split() == [f"w{i}" for i in expected.tolist()]
    assert f"{saved}: lowered 2 FFNs\n" in (tmp_path / "log.txt").read_text()
    assert int((tmp_path / "calls").read_text()) == 5 * 2  # each layer in each of the five steps


def test_only_what_the_server_loads_is_lowered(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cli.serving.model_manager import ModelManager

    from ltepass.serving.lowered_server import lowered_as_loaded

    def load(self: Any, name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(name)

    monkeypatch.setattr(ModelManager, "_load_model", load)
    with lowered_as_loaded():
        assert ModelManager._load_model(None, saved)._lte.lowered == "ffn"
        assert load(None, str(saved))._lte.lowered is None, "somebody else in the same process"
    assert ModelManager._load_model is load
