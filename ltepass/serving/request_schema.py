"""What a request to the server may hold: OpenAI's fields, types and ranges, as far as transformers serves them.

Fields that no class names are left to transformers, which refuses those that it does not know. Types are strict: "5" is
no number and true no integer. What is none of them is a BadRequestError. Imported by the server alone, for pydantic
comes with the extra "serve".
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MOST_TOKENS = 1 << 20  # of an answer, where the model's own limit is not known
T = TypeVar("T")
NonEmpty = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[Finite, Field(ge=0, le=2)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
One = Annotated[int, Field(ge=1, le=1, description="one choice is answered")]
Stop = NonEmpty | Annotated[list[NonEmpty], Field(min_length=1, max_length=16)]
TEXT = ("text", "input_text", "output_text")
# The field that holds what a part of another kind shows.
SHOWN = {
    "image_url": "image_url",
    "input_image": "image_url",
    "input_audio": "input_audio",
    "video_url": "video_url",
    "audio_url": "audio_url",
}


class BadRequestError(Exception):
    def __init__(self, status: int, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.status, self.param = status, param


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Part(_Fields):
    """A piece of a message's content."""

    type: Literal[
        "text", "input_text", "output_text", "image_url", "input_image", "input_audio", "video_url", "audio_url"
    ]
    text: str | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Part:
        needed = "text" if self.type in TEXT else SHOWN[self.type]
        value = getattr(self, needed, None)
        if not isinstance(value, str | dict):
            raise ValueError(f"a part of type {self.type!r} has no {needed!r}")
        if isinstance(value, dict) and not isinstance(value.get("data" if needed == "input_audio" else "url"), str):
            raise ValueError(f"{needed!r} names no data")
        return self


class Function(_Fields):
    name: NonEmpty
    arguments: str | dict[str, object] = "{}"

    @model_validator(mode="after")
    def _arguments_are_an_object(self) -> Function:
        _json_object(self.arguments, "arguments")
        return self


class ToolCall(_Fields):
    function: Function


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.tool_calls is None:
            raise ValueError("a message needs content")
        if "tool_calls" in self.model_fields_set and self.tool_calls is None:
            raise ValueError("tool_calls is null; leave it away")
        return self


class Tool(_Fields):
    type: Literal["function"]
    function: dict[str, object]

    @model_validator(mode="after")
    def _has_a_name(self) -> Tool:
        if not isinstance(self.function.get("name"), str):
            raise ValueError("a function needs a name")
        return self


class StreamOptions(_Fields):
    include_usage: bool | None = None


class LoadRequest(_Fields):
    model: Annotated[str, Field(min_length=1, max_length=4096)]

    def asked_tokens(self) -> dict[str, int]:
        """By field: how many tokens an answer may have."""
        return {}

    def passed_on(self) -> dict[str, object]:
        """What transformers gets of it: with the schema's types, and without defaults."""
        return self.model_dump(exclude_unset=True)


class _Request(LoadRequest):
    """What all requests for text have in common."""

    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: Seed | None = None
    user: str | None = None
    generation_config: str | None = None

    def asked_tokens(self) -> dict[str, int]:
        asked = {
            name: getattr(self, name, None) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")
        }
        if self.generation_config is not None:
            settings = _json_object(self.generation_config, "generation_config")
            asked |= {f"generation_config.{name}": settings.get(name) for name in ("max_new_tokens", "max_length")}
        return {name: value for name, value in asked.items() if value is not None}

    @model_validator(mode="after")
    def _counts_are_counts(self) -> _Request:
        for name, value in self.asked_tokens().items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a number of tokens")
        return self


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stop: Stop | None = None
    n: One | None = None
    frequency_penalty: Annotated[Finite, Field(gt=-1, le=2)] | None = None  # 1 + it is transformers' factor
    presence_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[Finite, Field(ge=-100, le=100)]] | None = (
        None
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, object] | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, object] | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    store: bool | None = None
    chat_template_kwargs: dict[str, object] = {}

    def passed_on(self) -> dict[str, object]:
        """The length by its older name, which counts less where both are given: transformers 5.17 ignores the newer."""
        content = super().passed_on()
        length = content.pop("max_completion_tokens", None)
        return content if length is None else content | {"max_tokens": length}


class TextRequest(_Request):
    prompt: NonEmpty
    suffix: str | None = None
    max_tokens: Tokens | None = None
    stop: Stop | None = None
    n: One | None = None
    best_of: One | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    frequency_penalty: Annotated[Finite, Field(gt=-1, le=2)] | None = None
    presence_penalty: Penalty | None = None
    stream_options: StreamOptions | None = None


class Item(_Fields):
    """Of a response's input: a message, a piece of one, or a call of a tool and what it gave."""

    type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_one_of_them(cls, item: object) -> object:
        if not isinstance(item, dict):
            raise ValueError("expected an object")
        if "role" in item:
            Message.model_validate(item)
        elif item.get("type") == "function_call":
            Function.model_validate(item)
            _require_text(item, "call_id")
        elif item.get("type") == "function_call_output":
            _require_text(item, "call_id", "output")
        elif item.get("type") == "reasoning":
            for part in item.get("content") or []:
                Part.model_validate({"type": "text", "text": part.get("text") if isinstance(part, dict) else None})
        else:
            Part.model_validate(item)
        return item


class ResponseRequest(_Request):
    input: NonEmpty | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    tools: list[dict[str, object]] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, object] | None = None
    chat_template_kwargs: dict[str, object] | None = None

    @model_validator(mode="after")
    def _one_kind_of_items(self) -> ResponseRequest:
        if isinstance(self.input, list):
            kinds = {"piece" if item.type in (*TEXT, *SHOWN) else "message" for item in self.input}
            if len(kinds) > 1:
                raise ValueError("input mixes messages and pieces of one message")
        return self


SCHEMAS: dict[str, type[LoadRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": TextRequest,
    "/v1/responses": ResponseRequest,
    "/load_model": LoadRequest,
}


def _json_object(value: str | dict[str, object], name: str) -> dict[str, object]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no JSON object")
    return found


def _require_text(item: dict[str, object], *names: str) -> None:
    for name in names:
        if not isinstance(item.get(name), str):
            raise ValueError(f"an item of type {item.get('type')!r} has no {name!r}")


def parsed(body: bytes) -> dict[str, object]:
    try:
        content = json.loads(body, parse_constant=_no_json)
    except UnicodeDecodeError as error:
        raise BadRequestError(400, f"the request is no UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadRequestError(400, f"the request is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadRequestError(400, f"the request is a JSON {type(content).__name__}; expected an object")
    return content


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def refused(error: ValidationError) -> BadRequestError:
    """One line about the first fault; where a value may be of several kinds, about the kind that fits best."""
    first = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part.isidentifier())
    seen = "" if first["type"] in ("missing", "value_error") else f", not {_short(first['input'])}"
    text = first["msg"].removeprefix("Value error, ")
    return BadRequestError(400, f"{where}: {text}{seen}" if where else text, where or None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
