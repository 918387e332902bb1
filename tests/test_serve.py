"""`ltepass serve`: transformers' own server loads a saved model, lowers it, and answers as the model does by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import ltepass

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

# The command, with the op's calls counted: what it answers must come from the lowered model.
COUNTING = """
import atexit, pathlib, sys
from ltepass import lowering
from ltepass.cli import main
file, op, calls = pathlib.Path(sys.argv.pop(1)), lowering.routed_ffn, []
lowering.routed_ffn = lambda *a: (calls.append(1), op(*a))[1]
atexit.register(lambda: file.write_text(str(len(calls))))
main()
"""


def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(60)} | {"?": 60}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", pad_token="?", chat_template=template)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=61, eos_token_id=None, **sizes))
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=6, grouping="identity"))
    model.save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_the_server_answers_with_the_lowered_model(saved: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", COUNTING, str(tmp_path / "calls"), "serve", str(saved), "--port", str(port)]
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--device", "cpu"], stdout=file, stderr=file, env=os.environ)
    try:
        while "running on" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        question = {"role": "user", "content": "w1 w2 w3"}
        asked = {"model": str(saved), "messages": [question], "max_tokens": 5, "temperature": 0}
        answer = ask(port, "/v1/chat/completions", asked)["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=60)[0, 3:]
    assert answer.split() == [f"w{i}" for i in expected.tolist()]
    assert int((tmp_path / "calls").read_text()) == 5 * 2  # each layer in each of the five steps
