"""A name that is no folder here: of the hub, where it can be reached; no minutes where it cannot."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest

from ltepass.commands.hub import answers, look_for_hub
from ltepass.commands.inspect import inspect_model
from ltepass.commands.load import load, tokenizer_of
from ltepass.commands.training_data import read_rows
from ltepass.errors import ConfigError


class Refuses(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    served = HTTPServer(("127.0.0.1", 0), Refuses)
    Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


@pytest.fixture
def nobody() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_server_that_refuses_does_answer(server: str, nobody: str) -> None:
    assert answers(server)
    assert not answers(nobody)


@pytest.mark.parametrize("reached", [True, False])
def test_without_the_hub_its_library_is_offline(
    reached: bool, server: str, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server if reached else nobody)
    look_for_hub()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is not reached


def test_a_name_that_cannot_be_reached_is_asked_for_once(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr("time.sleep", asked.append)  # what the hub's library does between tries
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
    for read in (load, tokenizer_of, inspect_model, read_rows):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(ConfigError, match="'no-such/name' is no"):
            read("no-such/name")
    assert not asked


@pytest.mark.parametrize("name", ["./none", "../none", "~/none", "a/b/none", "{}/none", "a/none.gguf"])
def test_what_can_only_be_a_path_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltepass.commands.load.look_for_hub", lambda: pytest.fail("asked"))
    for read in (load, tokenizer_of, inspect_model):
        with pytest.raises(ConfigError, match="no model directory, nor can it be a name of the hub"):
            read(name.format(tmp_path))
