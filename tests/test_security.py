"""SECURITY.md says what the tests show: each sentence names one, and each one named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")

pytestmark = pytest.mark.skipif(not (ROOT / "SECURITY.md").exists(), reason="runs in a source tree only")


def points() -> list[str]:
    """The list items of the file, each on one line."""
    _, *items = re.split(r"^- ", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    return [" ".join(item.split("\n#")[0].split()) for item in items]


def test_every_point_names_a_test() -> None:
    assert len(points()) > 10
    for point in points():
        assert NAMED.search(point), point


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall((ROOT / "SECURITY.md").read_text())
    for file, name in named:
        functions = {n.name for n in ast.parse((ROOT / file).read_text()).body if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"


def test_no_remote_code_is_ever_trusted() -> None:
    for folder in ("ltepass", "passes", "kernels", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), f"{file}:{node.lineno}"
                assert not (isinstance(node, ast.Constant) and node.value == "trust_remote_code"), (
                    f"{file}:{node.lineno}"
                )
                if isinstance(node, ast.keyword) and node.arg == "weights_only":
                    assert not (isinstance(node.value, ast.Constant) and node.value.value is False), file
