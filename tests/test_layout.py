"""The house: imports run one way among folders, and the wheel holds nothing of the workshop."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Bottom to top. A folder, or a module of `ltepass/` itself, imports from floors below its own, and from itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "old_names", "grouping_methods"),
    ("config", "paths", "whole_file", "progress", "corpora", "threads", "cache", "transformers_hook", "pages"),
    ("gguf_models",),
    ("kernels",),
    ("routed",),
    ("sparsity", "passes.graph"),
    ("passes.capture",),
    ("passes.find", "passes.group"),
    ("passes.insert", "calibration"),
    ("passes.lower",),
    ("passes",),
    ("exporting", "pruning"),
    ("transform_and_lower",),
    ("quantise_weights",),
    ("measure",),
    ("saving",),
    ("serving",),
    ("training",),
    ("ltepass",),  # the public names, which the root package holds
    ("demo",),
    ("commands",),
    ("cli",),
)
TOP = ("__init__", "__main__", "backend")  # the root package itself, its program, and a forward for older installs
KNOWS_NAMES = ("old_names",)  # strings of this module name modules for others to import
SOURCES = (("ltepass", "ltepass"), ("passes", "ltepass.passes"), ("kernels", "ltepass.kernels"))
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def folder_of(module: str) -> str:
    """What a module or a name in it belongs to: the longest entry of FLOORS that it begins with."""
    parts = module.split(".")[1:]
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in FLOOR), "ltepass")


def used(tree: ast.AST, *, strings: bool = True) -> Iterator[str]:
    """Dotted names of ours that a module uses: imports wherever they stand, and strings that name a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ltepass":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ltepass")
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = node.value.split(".")
            if words[0] == "ltepass" and len(words) > 1 and all(word.isidentifier() for word in words):
                yield node.value


def modules() -> Iterator[tuple[Path, str]]:
    """Every file of the library with its dotted name; the links to the two top-level folders are not followed."""
    for folder, dotted in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if not (folder == "ltepass" and parts[0] in ("passes", "kernels")):
                yield file, ".".join((dotted, *parts))


def against_the_direction(module: str, tree: ast.AST) -> list[str]:
    here, last = folder_of(module.removesuffix(".__init__")), module.rpartition(".")[2]
    names = used(tree, strings=last not in KNOWS_NAMES)
    return [name for name in names if folder_of(name) != here and FLOOR[folder_of(name)] >= FLOOR[here]]


def test_imports_run_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} uses {name}"
        for file, module in modules()
        if module.removeprefix("ltepass.") not in TOP
        for name in against_the_direction(module, ast.parse(file.read_text()))
    ]
    assert not wrong, "\n".join(wrong)


def test_an_import_a_string_and_a_use_of_the_root_are_each_seen() -> None:
    for code in (
        "from ltepass.training import stages",
        "def f():\n    from ltepass.transform_and_lower import transform",
        "import_module('ltepass.saving.quantizer')",
        "import ltepass",
        "from ltepass import transform",
    ):
        assert against_the_direction("ltepass.routed.sites", ast.parse(code)), code
    assert not against_the_direction("ltepass.routed.sites", ast.parse("from ltepass.errors import LTEError"))


def test_every_folder_has_its_floor() -> None:
    for file, module in modules():
        if module.removeprefix("ltepass.") not in TOP:
            assert folder_of(module.removesuffix(".__init__")) != "ltepass", f"{file}: add it to FLOORS"


def test_the_library_imports_nothing_of_the_workshop() -> None:
    for file, _ in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] in ("examples", "tests") for name in names), file
