"""`import torch` makes transformers know our folders, whatever is imported first, and breaks nobody's import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

import ltepass_autoload
from ltepass_autoload import FirstRead, install
from tests.child import ROOT

NAME = "stand_in_of_the_tables"
TABLE = "AUTO_QUANTIZATION_CONFIG_MAPPING = {}\n"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module in place of transformers' one, not imported; no finder of ours is there."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__module__ != "ltepass_autoload"])
    monkeypatch.setattr(ltepass_autoload, "TABLES", NAME)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return tmp_path / f"{NAME}.py"


def finders() -> int:
    return sum(type(finder).__module__ == "ltepass_autoload" for finder in sys.meta_path)


def imported() -> ModuleType:
    return importlib.import_module(NAME)


def entry(module: ModuleType) -> object:
    return module.AUTO_QUANTIZATION_CONFIG_MAPPING.get("lte")


def test_before_the_tables_and_twice(tables: Path) -> None:
    tables.write_text(TABLE)
    install()
    install()
    assert finders() == 1
    assert entry(imported()) is FirstRead
    assert finders() == 0


def test_after_the_tables(tables: Path) -> None:
    tables.write_text(TABLE)
    module = imported()
    install()
    assert entry(module) is FirstRead
    assert finders() == 0


def test_from_within_the_tables_the_next_import_fills_them(tables: Path) -> None:
    tables.write_text(f"import ltepass_autoload\nltepass_autoload.install()\n{TABLE}")
    module = imported()
    assert entry(module) is None
    with pytest.raises(ImportError):
        importlib.import_module("no_such_module_of_anybody")
    assert entry(module) is FirstRead
    assert finders() == 0


def test_an_entry_that_is_there_stays(tables: Path) -> None:
    tables.write_text("AUTO_QUANTIZATION_CONFIG_MAPPING = {'lte': 7}\n")
    install()
    assert entry(imported()) == 7


@pytest.mark.parametrize("source", ["", "AUTO_QUANTIZATION_CONFIG_MAPPING = 7"], ids=["none", "a number"])
def test_tables_of_another_form_are_left_as_they_are(tables: Path, source: str) -> None:
    tables.write_text(source)
    install()
    assert getattr(imported(), "AUTO_QUANTIZATION_CONFIG_MAPPING", 7) == 7
    install()


def test_an_import_that_fails_fails_as_it_did(tables: Path) -> None:
    tables.write_text("raise KeyError('theirs')")
    install()
    with pytest.raises(KeyError, match="theirs"):
        imported()
    tables.unlink()
    install()
    with pytest.raises(ModuleNotFoundError, match=NAME):
        imported()


def test_the_first_config_imports_the_package_which_takes_the_entry_over() -> None:
    from ltepass.errors import CheckpointError

    with pytest.raises(CheckpointError):
        FirstRead.from_dict({"quant_method": "lte"})
    auto = importlib.import_module("transformers.quantizers.auto")
    quantizer = importlib.import_module("ltepass.saving.quantizer")
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lte"] is quantizer.LTEQuantizationConfig
    assert auto.AUTO_QUANTIZER_MAPPING["lte"] is quantizer.LTEQuantizer


def test_it_imports_the_standard_library_alone(tmp_path: Path) -> None:
    """Another module of ours would import torch, which is not whole yet."""
    tree = ast.parse((ROOT / "ltepass_autoload.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
    code = "import ltepass_autoload, sys; ltepass_autoload.install(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False"], done.stderr


def test_the_entry_point_is_the_function() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    assert [EntryPoint(name, value, "torch.backends").load() for name, value in points.items()] == [install]
