"""Runs the kernels on this machine's CPU: triton decides when it is imported whether to interpret, so by a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.old_versions import needs_interpreter

HERE = Path(__file__).parent


@needs_interpreter
def test_kernels_under_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(HERE / "interpreted_kernels.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
