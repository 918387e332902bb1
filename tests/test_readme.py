"""What the README shows is true: its example runs, its table is what `make readme` makes, its commands exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.results.demo_table import BEGIN, END, KEPT, with_table
from ltepass.demo.table import markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs_as_it_stands(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15, "the README promises fifteen lines"
    env = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "FFN sites" in done.stdout


def test_table_is_made_from_the_kept_numbers() -> None:
    assert BEGIN in README
    assert END in README
    if not (ROOT / KEPT).exists():
        pytest.skip(f"no demo was measured yet: {KEPT} is missing")
    assert with_table(README, markdown(json.loads((ROOT / KEPT).read_text()))) == README, "run `make readme`"


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_every_command_it_names_exists() -> None:
    from ltepass.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    named = set(re.findall(r"`ltepass (\w+)", README))
    assert named
    assert named <= known


def test_nothing_names_a_machine_of_its_makers() -> None:
    """Paths and hosts of a development machine help no reader."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve():
            text = path.read_text(errors="replace")
            assert not re.search(r"/work/(shared|main|venv|\.library)|pypi\.org|files\.pythonhosted", text), name
