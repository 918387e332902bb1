"""How much of the library is typed as `Any`: what no checker sees. The count may fall, and the limit with it."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

from torch import nn

import ltepass

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 87  # the count of the day


def library() -> Iterator[tuple[str, ast.Module]]:
    """Every file outside kernels/gpu, where triton types nothing."""
    for folder in ("ltepass", "passes", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith(("kernels/gpu/", "ltepass/kernels/", "ltepass/passes/")):  # the last two are links
                yield name, ast.parse(file.read_text())


def is_any(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Name) and node.id == "Any"


def test_any_is_counted_and_does_not_grow() -> None:
    counts = Counter({name: sum(map(is_any, ast.walk(tree))) for name, tree in library()})
    print(f"{counts.total()} times Any; most in {counts.most_common(10)}")
    assert counts.total() <= LIMIT


def other_names(tree: ast.Module) -> Iterator[int]:
    """The lines that give Any another name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_any(node.value):
            yield node.lineno
        if isinstance(node, ast.alias) and node.name == "Any" and node.asname:
            yield node.lineno


def test_any_has_no_other_name() -> None:
    assert [(name, line) for name, tree in library() for line in other_names(tree)] == []
    assert list(other_names(ast.parse("from typing import Any as A\nB = Any\nC: object = Any\nx: Any = 3"))) == [
        2,
        3,
        1,
    ]


def test_no_module_is_left_out_of_the_type_check() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert checked["strict"]
    assert {"ltepass", "examples", "tests"} <= set(checked["packages"])
    assert [o["module"] for o in checked["overrides"] if o.get("ignore_errors")] == []


def test_lower_keeps_the_type_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    assert (
        assert_type(ltepass.unlower(assert_type(ltepass.lower(model, ffn=False), nn.Sequential)), nn.Sequential)
        is model
    )
