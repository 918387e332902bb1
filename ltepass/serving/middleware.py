"""What stands before transformers' server: a bad request gets one line that says what is wrong, and a 4xx.

    request -> parsed and checked (request_schema.py) -> transformers' handler -> answer, errors in OpenAI's form

transformers answers some bad requests by 500, and others, once a stream has begun, by 200: an error that reaches the
handler becomes a 4xx here, and a stream's status is held back until its first words are there. Its list of models is
that of the hub's cache, and an error without one; here it begins with what is served.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from huggingface_hub import CacheNotFound
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ltepass.serving.request_schema import MOST_TOKENS, SCHEMAS, BadRequestError, parsed, refused

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
    from transformers.cli.serving.model_manager import ModelManager

MOST_BYTES = 32 << 20  # of a request
STREAM = "text/event-stream"
Listed = dict[str, str | int]  # a model, as OpenAI's list has it
ASKED: ContextVar[bool] = ContextVar("ASKED", default=False)  # whether this request says how long its answer may be
OF_THE_REQUEST = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def checked_server() -> Iterator[None]:
    """Servers that transformers builds inside check their requests first."""
    from transformers.cli.serving import server
    from transformers.cli.serving.utils import CBGenerateManager, GenerateManager

    build, names = server.build_server, ("generate_streaming", "generate_non_streaming")
    methods = [(cls, name, getattr(cls, name)) for cls in (GenerateManager, CBGenerateManager) for name in names]

    def build_checked(manager: ModelManager, *args: object, **kwargs: object) -> Starlette:
        manager.get_gen_models = functools.partial(_models, manager, manager.get_gen_models)
        app: Starlette = build(manager, *args, **kwargs)
        app.add_middleware(CheckedRequests, manager=manager)
        return app

    server.build_server = build_checked
    for cls, name, method in methods:
        setattr(cls, name, _within_context(method))
    try:
        yield
    finally:
        server.build_server = build
        for cls, name, method in methods:
            setattr(cls, name, method)


def _models(manager: ModelManager, cached: Callable[[], list[Listed]]) -> list[Listed]:
    """What is loaded, by the name that a request gives it, then what the hub's cache holds."""
    loaded = [name.removesuffix("@main") for name in manager.loaded_models]
    try:
        others = [model for model in cached() if model["id"] not in loaded]
    except CacheNotFound:
        others = []
    return [*({"id": name, "object": "model", "created": 0, "owned_by": "ltepass"} for name in loaded), *others]


def _within_context(generate: Callable[..., object]) -> Callable[..., object]:
    """A prompt and its answer have to fit into the model's context; an answer whose length nobody asked for ends there.

    The prompt's tokens are counted here: transformers has just made them.
    """

    @functools.wraps(generate)
    def checked(
        self: object,
        model: PreTrainedModel,
        processor: object,
        inputs: dict[str, list[int] | Tensor],
        config: GenerationConfig,
        *args: object,
        **kwargs: object,
    ) -> object:
        ids = inputs["input_ids"]
        prompt, most = len(ids if isinstance(ids, list) else ids[0]), _context(model.config)
        new = most if config.max_new_tokens is None else config.max_new_tokens
        if prompt >= most or (ASKED.get() and prompt + new > most):
            answer = f" and the answer may have {new}" if prompt < most else ""
            raise ValueError(f"the prompt has {prompt} tokens{answer}; this model has room for {most} together")
        config.max_new_tokens = min(new, most - prompt)
        return generate(self, model, processor, inputs, config, *args, **kwargs)

    return checked


class CheckedRequests:
    """ASGI middleware. manager: transformers' ModelManager, which knows the limits of loaded models."""

    def __init__(self, app: ASGIApp, manager: ModelManager) -> None:
        self.app, self.manager = app, manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = _Answer(send)
        try:
            if scope["method"] == "POST" and scope["path"] in SCHEMAS:
                receive = _again(self.checked(scope, await _body(receive)), receive)
            await self.app(scope, receive, answer.send)
            await answer.end()
        except BadRequestError as error:
            await answer.refuse(error.status, str(error), error.param)
        except Exception as error:
            await answer.fail(error)

    def checked(self, scope: Scope, body: bytes) -> bytes:
        """The request with the schema's types: 1 where a number may have digits is 1.0. Raises BadRequestError."""
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise BadRequestError(415, f"the content type is {kind!r}; expected application/json")
        content = parsed(body)
        try:
            request = SCHEMAS[scope["path"]].model_validate(content)
        except ValidationError as error:
            raise refused(error) from None
        ASKED.set(bool(request.asked_tokens()))
        most = self._most_tokens(request.model)
        for name, asked in request.asked_tokens().items():
            if asked > most:
                raise BadRequestError(400, f"{name} is {asked}; this model has room for {most} tokens", name)
        return json.dumps(request.passed_on()).encode()

    def _most_tokens(self, model: str) -> int:
        loaded = self.manager.loaded_models.get(self.manager.process_model_name(model))
        config = getattr(getattr(loaded, "model", None), "config", None)
        return MOST_TOKENS if config is None else _context(config)


def _context(config: PreTrainedConfig) -> int:
    """Tokens that a model has positions for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequestError(400, "the client went away")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MOST_BYTES:
            raise BadRequestError(413, f"the request has more than {MOST_BYTES} bytes")
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What was read, to be read once more; after it, what else comes (a client that goes away)."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return waiting.pop() if waiting else await receive()

    return read


class _Answer:
    """Passes an answer on, errors in OpenAI's form. An error's words, and a stream's first ones, are waited for."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.start: Message | None = None  # not sent yet
        self.held: list[bytes] = []
        self.passing = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            if message["status"] < 400 and not self._is_stream():
                await self._pass_on()
        elif self.passing or self.start is None:
            await self._send(message)
        else:
            self.held.append(message.get("body", b""))
            more = message.get("more_body", False)
            if not more:
                await self.end()
            elif self.start["status"] < 400 and len([part for part in self.held if part]) == 2:
                await self._judge(more=True)

    async def end(self) -> None:
        if self.start is not None and not self.passing:
            await self._judge(more=False)

    async def _judge(self, *, more: bool) -> None:
        assert self.start is not None
        text = b"".join(self.held).decode(errors="replace")
        if self.start["status"] >= 400:
            await self.refuse(self.start["status"], _detail(text))
        elif fault := _fault_in(text):
            await self.refuse(400, f"the model cannot answer this: {fault}")
        else:
            await self._pass_on()
            await self._send({"type": "http.response.body", "body": b"".join(self.held), "more_body": more})

    async def _pass_on(self) -> None:
        assert self.start is not None
        self.passing = True
        await self._send(self.start)

    def _is_stream(self) -> bool:
        assert self.start is not None
        return Headers(raw=list(self.start["headers"])).get("content-type", "").startswith(STREAM)

    async def refuse(self, status: int, text: str, param: str | None = None) -> None:
        if self.passing:  # too late to say so
            return
        self.passing = True
        kind = "invalid_request_error" if status < 500 else "server_error"
        line = " ".join(text.split())[:1000]
        body = json.dumps({"error": {"message": line, "type": kind, "param": param, "code": None}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: Exception) -> None:
        """An error of the handler: transformers raises the same kinds for what it cannot serve and cannot load."""
        if self.passing:
            raise error
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):  # from_pretrained's, of a model that is not there
            await self.refuse(404, f"the model cannot be loaded ({what})", "model")
        elif _is_of_the_request(error):
            await self.refuse(400, f"the request cannot be served ({what})")
        else:
            await self.refuse(500, what)


def _is_of_the_request(error: Exception) -> bool:
    """Whether an error of a handler is about the request, as templates', tokenizers' and shapes' are."""
    if type(error) is RuntimeError:  # torch's for shapes, as of a prompt without a token; its others are subclasses
        return "memory" not in str(error)
    return isinstance(error, OF_THE_REQUEST) or type(error).__module__.startswith("jinja2")


def _detail(text: str) -> str:
    """The words of an error that FastAPI or transformers wrote."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    found = found.get("detail", found.get("error", found)) if isinstance(found, dict) else found
    return found if isinstance(found, str) else json.dumps(found)


def _fault_in(stream: str) -> str | None:
    """What a stream's first events say went wrong. transformers writes the words as they are, so it may be no JSON."""
    for line in stream.splitlines():
        if line.startswith('data: {"error":') or any(mark in line for mark in ('"type":"error"', '"status": "error"')):
            return line.removeprefix("data: ")
    return None
