"""The workers of the CPU kernels (`kernels/cpu/pool.cpp`), compiled with a hook that holds one of them back.

No time is asserted: a worker that others waited for in vain would be a test that never ends, which its timeout ends.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ltepass.kernels.cpu import build
from tests.child import environment

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
DRIVER = Path(__file__).with_name("pool_driver.cpp")
CASES = (
    "any_counts",
    "nested",
    "callers",
    "exceptions",
    "late_worker",
    "sleeping_worker",
    "slow_piece",
    "forks",
    "ends_at_once",
    "hears_no_signal",
)
SECONDS = 120  # a loaded machine takes a few


def compiled(target: Path, *flags: str) -> Path | None:
    """None where this compiler lacks what the flags ask for."""
    command = [*build.compile_command(), "-std=c++20", "-g", "-fopenmp", "-pthread", f"-I{build.HERE}", *flags]
    done = subprocess.run([*command, str(DRIVER), "-o", str(target)], capture_output=True, text=True)
    assert flags or done.returncode == 0, done.stderr
    return target if done.returncode == 0 else None


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = compiled(tmp_path_factory.mktemp("pool") / "driver")
    assert path is not None
    return path


@pytest.mark.parametrize("case", CASES)
def test_workers(driver: Path, case: str) -> None:
    done = subprocess.run([str(driver), case], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = compiled(tmp_path_factory.mktemp("pool") / "watched", "-O1", "-fsanitize=thread")
    if path is None:
        pytest.skip("this compiler has no thread sanitizer")
    return path


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("forks", "ends_at_once")])
def test_no_race(watched: Path, case: str) -> None:
    """Under the thread sanitizer, which cannot follow a fork, and calls an end in the middle of a call a leak."""
    env = environment(TSAN_OPTIONS="report_thread_leaks=0")
    done = subprocess.run([str(watched), case], env=env, capture_output=True, text=True, timeout=SECONDS)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr[-4000:]


FORK = """
import os, torch
from tests.kernels.linear_cases import Recipe as Linear, make as make_linear
from tests.kernels.routed_cases import Recipe, make
import ltepass.kernels.linear
torch.set_num_threads(2)
sparse, dense = make(Recipe(T=1)), make_linear(Linear(T=2, d_in=640, d_out=400))
def results():
    return [torch.ops.ltepass.routed_ffn(*sparse), torch.ops.ltepass.linear(*dense)]
expected = results()
for _ in range(5):
    child = os.fork()
    if child == 0:
        same = all(torch.equal(a, b) for _ in range(20) for a, b in zip(results(), expected))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(torch.equal(a, b) for a, b in zip(results(), expected))
"""


def test_a_forked_child_computes_the_same() -> None:
    """Where its parent has used the workers, of which it has none."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
