"""`pytest --hypothesis-profile=deep tests/properties` runs many more examples than CI does, and says how many."""

import re
from collections import Counter
from typing import Any

import pytest

PASSED: Counter[str] = Counter()  # examples by file


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Hypothesis' own count of the examples that ran and passed, of its stored ones and of new ones."""
    text = getattr(item, "hypothesis_statistics", "")
    PASSED[item.path.name] += sum(map(int, re.findall(r"(\d+) passing,", text)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["examples"] = dict(PASSED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    PASSED.update(getattr(node, "workeroutput", {}).get("examples", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, count in sorted(PASSED.items()):
        terminalreporter.write_line(f"{name}: {count:,} examples")
    terminalreporter.write_line(f"{sum(PASSED.values()):,} hypothesis examples passed")
