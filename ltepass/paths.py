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
