"""The kernels' tests once more, in a build that runs pieces of work last to first: threads show by luck alone that one
piece takes what another has left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ltepass.kernels.cpu.build import compile_command, levels

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "test_attention",
    "test_hidden_cut",
    "test_input_cut",
    "test_coded_chunks",
    "test_int8_router",
    "test_linear_cpu",
    "test_linear_op",
    "test_packed_tiers",
    "test_proxy",
    "test_routed_ffn_cpu",
    "test_routed_codes",
    "test_tiers",
)
MINUTES = 25  # two of them for the build


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES)
@pytest.mark.skipif(not compile_command(), reason="no C++ compiler")
@pytest.mark.parametrize("level", dict.fromkeys((levels()[0], levels()[-1])))
def test_nothing_depends_on_the_order_of_pieces(level: str, tmp_path: Path) -> None:
    env = os.environ | {
        "CXX": " ".join([*compile_command(), "-DLTEPASS_PIECES_BACKWARDS"]),
        "LTEPASS_CACHE_DIR": str(tmp_path),
        "LTEPASS_ISA": level,
        "OMP_NUM_THREADS": "2",
    }
    files = [f"tests/kernels/{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--timeout", "900", *files]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert list(tmp_path.rglob("*.so")), "a build of its own"
