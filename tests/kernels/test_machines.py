"""Machines where something is missing, broken or somebody else's: exact results, at most one warning, no exception."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ltepass import cache
from ltepass.demo import smollm
from ltepass.errors import CacheError
from ltepass.kernels.cpu import build, loading
from tests.child import environment
from tests.kernels.machine_driver import LOADS, REFUSES

posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of POSIX")
pytestmark = [posix, pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")]


@pytest.fixture(scope="module")
def out() -> Iterator[Path]:
    """Not pytest's own folder, which is closed to the users that some cases become."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    assert loading.load()
    kernel = cache.root() / build.object_name(build.isa())
    command = [sys.executable, "-m", "tests.kernels.machine_driver", str(out), str(kernel)]
    env = environment(OMP_NUM_THREADS="1")
    env.pop("LTEPASS_CACHE", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


# What needs no compiler, and what cannot be had without a warning.
KEPT = ("a good object", "a folder that others can write")


@pytest.mark.parametrize("case", LOADS)
def test_the_kernel_is_loaded_and_rebuilt_once_where_it_was_no_good(results: dict[str, Any], case: str) -> None:
    seen = results[case]
    assert seen["loaded"], seen
    assert seen["close"]
    old_name = case == "the variable's old name"
    assert len(seen["warnings"]) == old_name, seen["warnings"]
    assert not old_name or "set LTEPASS_CACHE_DIR" in seen["warnings"][0]
    assert seen["builds"] == {"a compiler of several words": 2}.get(case, 0 if case in KEPT else 1)
    assert [mode for mode in seen["modes"] if int(mode, 8) & 0o022] == []
    assert seen["modes"][0] == "0o700" or case in ("a pipe", "a link to nowhere", "a lock that nobody gives back")
    assert seen["left"] == [n for n in seen["left"] if n == "lock" or n.endswith(".so")]


@pytest.mark.parametrize("case", REFUSES)
def test_else_one_warning_and_the_plain_path(results: dict[str, Any], case: str) -> None:
    seen = results[case]
    assert seen["loaded"] is False, seen
    assert seen["close"]
    assert len(seen["warnings"]) == 1, seen["warnings"]
    assert REFUSES[case][1] in seen["warnings"][0]
    assert not [name for name in seen["left"] if name != "lock" and not name.endswith(".so")]


@pytest.mark.usefixtures("results")
def test_a_compiler_that_hangs_is_ended_with_its_children(out: Path) -> None:
    child = next(out.rglob("child"))
    stat = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_every_folder_that_is_made_is_closed_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache.private(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/c"):
        assert (tmp_path / folder).stat().st_mode & 0o7777 == 0o700


def test_a_folder_that_the_demo_did_not_make_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm, "wheel_file", lambda: tmp_path / "never-read.gguf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("mine too")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(CacheError, match="not there yet"):
            smollm.load_smollm2(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_both_caches_follow_one_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTEPASS_CACHE", str(tmp_path / "old"))
    monkeypatch.setenv("LTEPASS_CACHE_DIR", str(tmp_path))
    assert {smollm.default_cache().parent, cache.root()} == {tmp_path}
    monkeypatch.delenv("LTEPASS_CACHE_DIR")
    with pytest.warns(FutureWarning, match="set LTEPASS_CACHE_DIR"):
        assert smollm.default_cache().parent == tmp_path / "old"


def test_the_package_can_be_imported_without_fcntl() -> None:
    names = "ltepass.kernels.routed_ffn, ltepass.passes.lower.lower_model, ltepass.cli"
    code = f"import sys; sys.modules['fcntl'] = None; import {names}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
