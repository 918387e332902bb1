"""A server process over a tiny model, and requests to it: good ones, and bad ones of every kind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import ltepass
from tests.models.zoo import llama

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
JSON = "application/json"


def words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(60)} | {"?": 60}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", pad_token="?", chat_template=template)


def save_model(folder: Path) -> Path:
    torch.manual_seed(0)
    model = llama(eos_token_id=None)
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=6, grouping="identity"))
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@contextmanager
def serving(folder: Path, log: Path, command: tuple[str, ...] = ("-m", "ltepass")) -> Iterator[int]:
    """The port of a server of this model alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [sys.executable, *command, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        server = subprocess.Popen(line, stdout=file, stderr=file, env=os.environ)
    try:
        while "running on" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield port
        assert server.poll() is None, log.read_text()
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(60)
    if command == ("-m", "ltepass"):
        assert status == 130, "stopped as its log says how"
        assert "Aborted" not in log.read_text()


def ask(port: int, path: str, body: Any, kind: str | None = JSON, method: str = "POST") -> tuple[int, str]:
    """(status, body). body: bytes as they are, None for none, else JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    try:
        connection.request(method, path, data, {} if kind is None else {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def good(model: str, i: int = 0) -> tuple[str, dict[str, Any]]:
    """One of the forms that a good request has."""
    said = [{"role": "user", "content": f"w{i % 60} w2 w3"}]
    bodies = [
        (CHAT, {"messages": said, "max_tokens": 3, "temperature": 0}),
        (CHAT, {"messages": said, "max_tokens": 3, "stream": True}),
        (CHAT, {"messages": [{"role": "system", "content": "w1"}, *said], "max_completion_tokens": 2, "top_p": 1}),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "w1 w2"}]}], "max_tokens": 2, "n": 1},
        ),
        (TEXT, {"prompt": "w1 w2", "max_tokens": 3, "seed": 1}),
        (TEXT, {"prompt": "w1 w2", "max_tokens": 3, "stream": True, "temperature": 0.5}),
        (RESPONSES, {"input": "w1 w2", "max_output_tokens": 2, "stream": False}),
        (RESPONSES, {"input": said, "max_output_tokens": 2}),
        (CHAT, {"messages": said, "max_tokens": 2, "logit_bias": {"5": -3}}),
        (CHAT, {"messages": said, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}),
        (CHAT, {"messages": said, "max_tokens": 2, "tool_choice": "none", "store": False, "service_tier": "auto"}),
    ]
    path, body = bodies[i % len(bodies)]
    return path, {"model": model, **body}


def bad(model: str) -> dict[str, tuple[str, Any]]:
    """By what is wrong with it."""
    said = [{"role": "user", "content": "w1"}]
    chat = {"model": model, "messages": said, "max_tokens": 2}
    text = {"model": model, "prompt": "w1", "max_tokens": 2}
    response = {"model": model, "input": "w1", "max_output_tokens": 2}

    def without(body: dict[str, Any], name: str) -> dict[str, Any]:
        return {k: v for k, v in body.items() if k != name}

    def turn(**message: Any) -> tuple[str, Any]:
        return CHAT, chat | {"messages": [message]}

    values: dict[str, tuple[Any, ...]] = {
        "max_tokens": ("abc", -1, 0, 1.5, True, 10**12, 10**30, [3]),
        "max_completion_tokens": (-1, "3"),
        "temperature": (-1, "hot", float("nan"), float("inf"), 3, [0], True),
        "top_p": (7, -0.1, "1", float("nan")),
        "n": (0, 2, "1", -1),
        "stop": (3, "", [], [1], {"a": 1}),
        "stream": ("yes", 1, []),
        "seed": ("x", 0.5, 10**40),
        "frequency_penalty": (-1, 9, "x"),
        "logit_bias": ({"a": 1}, {"5": "x"}, [1], {"5": 1000}, {"99999": 1.0}),
        "tools": ("x", [1], [{"type": "function"}], [{"type": "function", "function": {}}]),
        "tool_choice": ("nope", 5),
        "stream_options": (3, {"include_usage": "x"}),
        "reasoning_effort": (3,),
        "service_tier": (3,),
        "modalities": ("text",),
        "store": ("x",),
        "chat_template_kwargs": (3, [1]),
        "generation_config": ("{", "[]", 3, '{"max_new_tokens": 1000000000}', '{"max_new_tokens": "x"}'),
        "messages": ("hello", [], [[]], ["hello"], {}, None, 3),
        "model": ("", 3, None, [], "no/such-model"),
        "no_such_field": (1,),
    }
    cases: dict[str, tuple[str, Any]]
    cases = {f"{k} {v!r}"[:60]: (CHAT, chat | {k: v}) for k, many in values.items() for v in many}
    cases |= {f"no {name}": (CHAT, without(chat, name)) for name in ("messages", "model")}
    cases |= {f"text, no {name}": (TEXT, without(text, name)) for name in ("prompt", "model")}
    cases |= {f"response, no {name}": (RESPONSES, without(response, name)) for name in ("input", "model")}
    cases |= {f"prompt {v!r}": (TEXT, text | {"prompt": v}) for v in ("", 3, ["w1"], None, [[1]])}
    cases |= {
        f"text {k} {v!r}": (TEXT, text | {k: v}) for k, v in (("temperature", -1), ("top_p", 7), ("max_tokens", -1))
    }
    cases |= {
        f"text streams, {k} {v!r}": (TEXT, text | {k: v, "stream": True})
        for k, v in (("temperature", -1), ("top_p", 7))
    }
    inputs: tuple[Any, ...] = ("", 3, [], [3], [{}], [{"role": "user"}])
    cases |= {f"input {v!r}": (RESPONSES, response | {"input": v}) for v in inputs}
    cases |= {f"max_output_tokens {v!r}": (RESPONSES, response | {"max_output_tokens": v}) for v in (-1, "x", 10**9)}
    cases |= {
        f"streams, {k} {v!r}": (CHAT, chat | {k: v, "stream": True}) for k, v in (("temperature", -1), ("top_p", 7))
    }
    cases |= {
        "a bad role": turn(role="wizard", content="w1"),
        "a role that is no text": turn(role=3, content="w1"),
        "no role": turn(content="w1"),
        "a name that is no text": turn(role="user", content="w1", name=3),
        "no content": turn(role="user"),
        "content null": turn(role="user", content=None),
        "content a number": turn(role="user", content=7),
        "a part without a type": turn(role="user", content=[{"text": "w1"}]),
        "a part without text": turn(role="user", content=[{"type": "text"}]),
        "a part of an unknown kind": turn(role="user", content=[{"type": "smell"}]),
        "an image without data": turn(role="user", content=[{"type": "image_url", "image_url": {}}]),
        "a tool call without a function": turn(role="assistant", tool_calls=[{"id": "1"}]),
        "tool calls null": turn(role="user", content="w1", tool_calls=None),
        "no token in the prompt": turn(role="user", content=""),
        "no token, streamed": (CHAT, chat | {"messages": [{"role": "user", "content": ""}], "stream": True}),
        "half a surrogate": turn(role="user", content="\ud800"),
        "cut JSON": (CHAT, json.dumps(chat)[:-9].encode()),
        "no body": (CHAT, b""),
        "a list": (CHAT, [chat]),
        "a text": (CHAT, b'"hello"'),
        "null": (CHAT, b"null"),
        "not UTF-8": (CHAT, json.dumps(chat).encode().replace(b"w1", b"\xff\xfe")),
        "nested deeply": (CHAT, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "arguments nested deeply": (CHAT, chat | {"generation_config": "[" * 100_000}),
        "load_model, no model": ("/load_model", {}),
        "load_model, a number": ("/load_model", {"model": 3}),
        "an unknown path": ("/v1/no/such/path", chat),
        "a path above": ("/../etc/passwd", chat),
    }
    return cases
