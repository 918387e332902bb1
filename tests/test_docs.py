"""The documentation: its examples run, what it names exists, and every public name stands in the reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ltepass
from ltepass.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
INCLUDED = re.compile(r'\{% include-markdown "(.*?)" start="(.*?)"(?: end="(.*?)")? %\}')
NOTEBOOK = ROOT / "examples" / "12_notebook.ipynb"


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}  # which dataclasses look up
    for block in blocks(page, "python"):
        assert len(block.splitlines()) <= 25, "examples stay short"
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out.strip(), "an example shows something"


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(navigation) == [page.name for page in PAGES]
    named = re.findall(r"^::: ltepass\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(set(ltepass.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_includes_or_names_is_there(page: Path) -> None:
    text = page.read_text()
    for file, start, end in INCLUDED.findall(text):
        source = (page.parent / file).read_text()
        at = source.index(start.replace("\\n", "\n"))
        assert not end or source.index(end, at) > at
    commands = {command.name or getattr(command.callback, "__name__", None) for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"^ltepass +(\w+)|`ltepass (\w+)", text, re.MULTILINE)) <= {
        pair for name in commands for pair in ((name, ""), ("", name))
    }
    for path in re.findall(r"`((?:kernels|passes|tests|examples)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`ltepass\.(\w+)", text):
        assert hasattr(ltepass, name), name


def test_the_cells_of_the_notebook_run(tmp_path: Path) -> None:
    """As a script: each cell's last line shows something, a report as HTML."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "no results are committed"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    shown = re.sub(r"^(ltepass\.report\(.*\))$", r"print('<table' in (\1)._repr_html_())", code, flags=re.MULTILINE)
    env = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", shown], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
