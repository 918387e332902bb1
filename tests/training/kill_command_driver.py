"""Run by test_cli_train in a process of its own: `ltepass train` in forked children, each killed at a random moment.

python -m tests.training.kill_command_driver FOLDER N ARGUMENTS: FOLDER/whole is what a run with these arguments wrote
that nobody killed, FOLDER/random I what the same command ended with after one of N kills. A line each says when.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ltepass.cli import main as ltepass
from tests.training.kill_driver import let_no_child_hold_a_lock, start


def train(arguments: Sequence[str], out: Path) -> None:
    sys.argv = ["ltepass", "train", *arguments, "--out", str(out)]
    try:
        ltepass()
    except SystemExit as stopped:
        if stopped.code:
            raise


def killed(arguments: Sequence[str], out: Path, seconds: float) -> bool:
    """Whether a run was still going so long after its beginning, and was killed then."""
    pid = start(train, arguments, out)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main() -> None:
    out, n, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    let_no_child_hold_a_lock()
    train(arguments, out / "first")  # with all imports, which children then have
    began = time.monotonic()
    assert os.waitpid(start(train, arguments, out / "whole"), 0)[1] == 0
    length, rng = time.monotonic() - began, random.Random(n)
    for i in range(n):
        seconds = length * (i + rng.random()) / n
        while not killed(arguments, out / f"random {i}", seconds):  # a machine is not always as quick
            shutil.rmtree(out / f"random {i}")
            seconds *= 0.9
        left = sorted(
            path.name for path in (out / f"random {i}").rglob("*") if path.is_dir() or path.suffix == ".safetensors"
        )
        status = os.waitpid(start(train, arguments, out / f"random {i}"), 0)[1]
        assert status == 0, f"the run after kill {i} ended with status {status}"
        print(f"killed after {seconds:.2f} of {length:.2f} s, leaving {' '.join(left) or 'nothing'}", file=sys.stderr)


if __name__ == "__main__":
    main()
