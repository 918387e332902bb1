"""Every test begins from the same random state, whichever tests ran before it, and long files begin first."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# No deadline: the first example of a process loads the kernels, and cores are shared.
ALWAYS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("quick", ALWAYS, max_examples=100)
settings.register_profile("deep", ALWAYS, max_examples=2500)
settings.load_profile("quick")

# Of few tests, but minutes: at the end of the run one core would wait for them.
LONG = frozenset(f"test_{name}.py" for name in "interpreter packaging trees compare gpu_script corpora".split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed torch before the fixtures of `item`: a failure in CI is then one that the same test shows alone."""
    torch.manual_seed(0)
