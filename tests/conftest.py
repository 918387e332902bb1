"""Every test begins from the same random state, whichever tests ran before it."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch before the fixtures of `item`: a failure in CI is then one that the same test shows alone."""
    torch.manual_seed(0)
