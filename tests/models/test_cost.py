"""The pass costs work in proportion to the number of layers: counted in lines of ltepass that run, not in seconds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ltepass
from tests.models.zoo import HF

PACKAGE = str(Path(ltepass.__file__).parent)


def lines_run(layers: int, name: str) -> int:
    """Lines of ltepass's own code that one transform runs."""
    model, count = HF[name](layers=layers), 0

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        ltepass.transform(model)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_work_grows_linearly_with_layers(name: str) -> None:
    work = {layers: lines_run(layers, name) for layers in (2, 4, 8, 16)}
    per_layer = [(work[2 * n] - work[n]) / n for n in (2, 4, 8)]
    assert min(per_layer) > 100
    assert max(per_layer) <= 1.1 * min(per_layer), work
