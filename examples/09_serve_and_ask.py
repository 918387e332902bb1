"""Serve a saved model, lowered, and ask it: any client of OpenAI's protocol does, here the standard library's."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ltepass


def save_model(folder: Path) -> None:
    """In the place of a model of yours: an untrained one, so its words mean nothing."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, eos_token_id=None, **sizes))
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=8, grouping="identity"))
    ltepass.set_mode(model, "hard")
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0", chat_template=template)
    tokenizer.save_pretrained(folder)


def ask(port: int, body: dict[str, object]) -> str:
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = Path(scratch) / "lte-model", Path(scratch) / "log"
        save_model(folder)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "ltepass", "serve", str(folder), "--port", str(port), "--device", "cpu"]
        print("$ ltepass", *command[3:])
        with log.open("w") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            while "running on" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.2)
            said = [{"role": "user", "content": "w1 w2 w3"}]
            print("answer:", ask(port, {"model": str(folder), "messages": said, "max_tokens": 8, "temperature": 0}))
            print("\n".join(line for line in log.read_text().splitlines() if "lowered" in line))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


if __name__ == "__main__":
    main()
