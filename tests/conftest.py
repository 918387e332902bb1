"""Every test begins from the same random state, whichever tests ran before it, and long files begin first."""

import pytest
import torch

# Of few tests, but minutes: at the end of the run one core would wait for them.
LONG = frozenset(f"test_{name}.py" for name in "interpreter packaging trees compare gpu_script corpora".split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch before the fixtures of `item`: a failure in CI is then one that the same test shows alone."""
    torch.manual_seed(0)
