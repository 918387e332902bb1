"""Which paths of modules may stand in a checkpoint and in generated source: FX writes them there as they are."""

from __future__ import annotations

import keyword
import re

_PLAIN = re.compile(r"[0-9A-Za-z_-]+")


def is_path(path: str) -> bool:
    """Whether each dotted part is an identifier or digits, hyphens allowed: no keyword, no `__class__` and the like."""
    return all(map(_is_part, path.split(".")))


def _is_part(part: str) -> bool:
    plain = part.isidentifier() or _PLAIN.fullmatch(part) is not None
    return plain and not keyword.iskeyword(part) and not part.startswith("__")


def one_line(text: str) -> str:
    """Without line breaks, terminal escapes and the like: text from a checkpoint is shown to users."""
    return "".join(c if c.isprintable() else " " for c in text)


def shown(value: object, limit: int = 60) -> str:
    """The repr of something foreign, for a message: unprintable characters escaped, cut short."""
    try:
        text = one_line(ascii(value))
    except (RecursionError, ValueError):  # nested without end, or an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
