"""Every test begins from the same random state, whichever tests ran before it."""

import sys
from typing import Any

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch before the fixtures of `item`: a failure in CI is then one that the same test shows alone."""
    torch.manual_seed(0)


def pytest_runtest_teardown() -> None:
    """Dynamo's lock is given back where a test left it taken: the threads of a later test would wait for ever."""
    dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
    while dynamo is not None and dynamo.compile_lock._is_owned():
        dynamo.compile_lock.release()
