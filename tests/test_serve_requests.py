"""Requests to `ltepass serve`: each good one is answered, each bad one refused by a line, and the server goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from tests.serving import CHAT, JSON, RESPONSES, TEXT, ask, bad, good, save_model, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="module")
def port(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with serving(Path(model), tmp_path_factory.mktemp("log") / "log.txt") as port:
        yield port


def assert_refused(status: int, text: str) -> None:
    assert 400 <= status < 500, (status, text)
    error = json.loads(text)["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def assert_answered(path: str, body: dict[str, object], status: int, text: str) -> None:
    assert status == 200, text
    assert "error" not in text.replace('"error":null', ""), text
    if path in (CHAT, TEXT) and not body.get("stream"):
        (choice,) = json.loads(text)["choices"]
        assert (choice["message"]["content"] if path == CHAT else choice["text"]).startswith("w")


def test_every_bad_request_is_refused_by_a_line(port: int, model: str) -> None:
    wrong = {}
    for name, (path, body) in bad(model).items():
        status, text = ask(port, path, body)
        try:
            assert_refused(status, text)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            wrong[name] = f"{status} {text[:150]} ({type(error).__name__})"
    assert not wrong
    assert ask(port, "/health", None, method="GET")[0] == 200


def test_what_is_wrong_is_named(port: int, model: str) -> None:
    said = {"model": model, "messages": [{"role": "user", "content": "w1"}]}
    for body, words in (
        (said | {"temperature": -1}, ("temperature", "greater than or equal to 0", "-1")),
        (said | {"messages": [{"role": "wizard", "content": "w1"}]}, ("messages.0.role", "wizard")),
        (said | {"max_tokens": 10**6}, ("max_tokens is 1000000", "room for")),
        ({"model": model}, ("messages", "required")),
    ):
        message = json.loads(ask(port, CHAT, body)[1])["error"]["message"]
        assert all(word in message for word in words), message


def test_a_prompt_and_its_answer_have_to_fit_into_the_context(port: int, model: str) -> None:
    """2,048 tokens. An answer whose length nobody asked for ends where the context does."""
    words = " ".join(["w1"] * 2040)
    said = [{"role": "user", "content": words}]
    for path, body, name in (
        (CHAT, {"messages": said}, "max_tokens"),
        (CHAT, {"messages": said, "stream": True}, "max_completion_tokens"),
        (TEXT, {"prompt": words}, "max_tokens"),
        (RESPONSES, {"input": words}, "max_output_tokens"),
    ):
        status, text = ask(port, path, {"model": model, name: 9} | body)
        assert_refused(status, text)
        assert "2040 tokens and the answer may have 9; this model has room for 2048 together" in text
        assert ask(port, path, {"model": model, name: 8} | body)[0] == 200, path
    assert_refused(*ask(port, TEXT, {"model": model, "prompt": f"{words} {words}"}))
    status, text = ask(port, CHAT, {"model": model, "messages": said})
    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] <= 8


def test_the_newer_name_of_an_answers_length_counts(port: int, model: str) -> None:
    said = {"model": model, "messages": [{"role": "user", "content": "w1"}], "temperature": 0}
    for asked, most in (
        ({"max_completion_tokens": 2}, 2),
        ({"max_completion_tokens": 2, "max_tokens": 5}, 2),
        ({"max_completion_tokens": None, "max_tokens": 5}, 5),
    ):
        status, text = ask(port, CHAT, said | asked)
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == most, asked


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_another_content_type_is_refused(port: int, model: str, kind: str | None) -> None:
    path, body = good(model)
    assert_refused(*ask(port, path, json.dumps(body).encode(), kind))
    assert ask(port, path, body, f"{JSON}; charset=utf-8")[0] == 200


def test_the_list_of_models_names_what_is_served(port: int, model: str) -> None:
    """A client's first question; transformers' own list fails where the hub's cache is not there."""
    path, body = good(model)
    assert ask(port, path, body)[0] == 200
    status, text = ask(port, "/v1/models", None, method="GET")
    assert status == 200, text
    assert [(one["id"], one["object"]) for one in json.loads(text)["data"]][:1] == [(model, "model")]


def test_another_method_is_refused(port: int) -> None:
    assert_refused(*ask(port, CHAT, None, method="GET"))


def test_every_form_of_a_good_request_is_answered(port: int, model: str) -> None:
    for i in range(11):
        path, body = good(model, i)
        assert_answered(path, body, *ask(port, path, body))


def test_two_clients_for_200_requests_every_tenth_bad(port: int, model: str) -> None:
    cases, rng = sorted(bad(model).items()), random.Random(0)
    plan = [(i, rng.choice(cases) if i % 10 == 9 else None) for i in range(200)]

    def one(item: tuple[int, tuple[str, tuple[str, object]] | None]) -> None:
        i, fault = item
        if fault is None:
            path, body = good(model, i)
            return assert_answered(path, body, *ask(port, path, body))
        return assert_refused(*ask(port, *fault[1]))

    with ThreadPoolExecutor(2) as clients:
        assert len(list(clients.map(one, plan))) == 200
    assert ask(port, "/health", None, method="GET")[0] == 200
