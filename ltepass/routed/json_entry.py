"""One JSON object of a config, read key by key: every key has its type, none is missing, none is unknown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeAlias, TypeVar

from ltepass.errors import CheckpointError, shown
from ltepass.paths import is_path

T = TypeVar("T")
Name = TypeVar("Name", bound=str)
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

LARGEST = 2**31  # of a size or an index


class Entry:
    """One JSON object, read key by key; what is left at the end is unknown. `where` names it in messages."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is {shown(value)}; expected a JSON object; {ADVICE}")
        self.where, self.rest = where, dict(value)
        self.seen: dict[str, Any] = {}

    def take(self, key: str, default: object = ...) -> object:
        if key not in self.rest and default is ...:
            raise CheckpointError(f"{self.where} lacks a key (KeyError: {key!r}); {ADVICE}")
        self.seen[key] = self.rest.pop(key, default)
        return self.seen[key]

    def wrong(self, key: str, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: {key} is {shown(self.seen[key])}; expected {expected}; {ADVICE}")

    def end(self, *ignored: str) -> None:
        unknown = [key for key in self.rest if key not in ignored]
        if unknown:
            raise CheckpointError(f"{self.where} has an unknown key (TypeError: {shown(unknown[0])}); {ADVICE}")

    def text(self, key: str, default: object = ...) -> str:
        value = self.take(key, default)
        return value if isinstance(value, str) else self.wrong(key, "a string")

    def list(self, key: str, default: object = ...) -> Sequence[object]:
        value = self.take(key, default)
        return value if isinstance(value, (list, tuple)) else self.wrong(key, "a list")

    def integer(self, key: str, low: int, high: int = LARGEST, default: object = ...) -> int:
        value = self.take(key, default)
        return value if type(value) is int and low <= value < high else self.wrong(key, f"an integer of at least {low}")

    def one_of(self, key: str, names: Collection[Name]) -> Name:
        value = self.take(key)
        found = next((name for name in names if name == value), None)
        return self.wrong(key, f"one of {', '.join(names)}") if found is None else found

    def path(self, key: str, *, root: bool = False) -> str:
        """Dotted names; the empty path is the root."""
        value = self.text(key)
        return value if is_path(value) or (root and not value) else self.wrong(key, "dotted names")

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        if key in self.rest and self.rest[key] is None:
            self.take(key)
            return None
        return read(key)


ADVICE = "ltepass did not write this: save the model again, or delete quantization_config to load it dense"
