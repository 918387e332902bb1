"""What a test cannot use with the versions that are installed."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


needs_interpreter = pytest.mark.skipif(
    release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4),
    reason="triton 3.6's interpreter takes scalars out of arrays in a way that numpy 2.4 refuses",
)
