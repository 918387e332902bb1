"""Run by test_robust in a process of its own: trains in forked children that kill themselves, and resumes them.

python -m tests.training.kill_driver FOLDER N: FOLDER/CASE/final.pt holds the weights that each case ended with, and
FOLDER/random I/final.pt those of N runs, each killed at a random moment.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.std import TqdmDefaultWriteLock, tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback

import ltepass
from ltepass.training import trainer as trainer_module
from ltepass.training.settings import LTESettings
from ltepass.training.trainer import LTETrainer
from tests.training.learning_cases import copied_text, fit, small_llama

# (stage, step, what is cut short): at the end of that step, or in the middle of writing its checkpoint
CASES: dict[str, tuple[str, int, str] | None] = {
    "whole": None,
    "before the first checkpoint": ("soft", 1, "step"),
    "soft": ("soft", 5, "step"),
    "soft, torn checkpoint": ("soft", 4, "checkpoint"),
    "hard": ("hard", 3, "step"),
    "hard, before its first checkpoint": ("hard", 1, "step"),
}
SETTINGS = LTESettings(soft_steps=6, hard_steps=5)


def run(folder: Path, kill: tuple[str, int, str] | None, begins: Callable[[], None] = lambda: None) -> None:
    """begins: called as the training does."""
    torch.manual_seed(0)
    config = ltepass.LTEConfig(group_size=4)
    model = ltepass.transform(small_llama().eval(), config=config, calibration=copied_text(32, 5).split(16))

    def die(trainer: Any, what: str) -> None:
        if kill == (trainer.stage, trainer.state.global_step, what):
            os.kill(os.getpid(), signal.SIGKILL)

    class Dying(LTETrainer):
        def fit(self, *args: Any) -> None:
            begins()
            super().fit(resume_from_checkpoint=True)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainer = self

            class AtStepEnd(TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                    die(trainer, "step")

            self.add_callback(AtStepEnd())

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            die(self, "checkpoint")
            super()._save_optimizer_and_scheduler(output_dir)

    fit(model, folder, SETTINGS, trainer=Dying, save_strategy="steps", save_steps=2)
    torch.save(model.state_dict(), folder / "final.pt")


def let_no_child_hold_a_lock() -> None:
    """tqdm's default lock is shared with forked processes: one that was killed while it held it would stop all others.

    Before anything shows a bar.
    """
    TqdmDefaultWriteLock.mp_lock = None
    tqdm.monitor_interval = 0


def start(call: Callable[..., None], *args: Any) -> int:
    """The id of a forked child that makes the call; nothing has used threads before."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            call(*args)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def in_child(*args: Any) -> int:
    """The exit status of `run` in a forked child."""
    return os.waitpid(start(run, *args), 0)[1]


def kill_after(folder: Path, seconds: float) -> bool:
    """Starts a run, and kills it so long after its training began; False where it was over by then."""
    here, there = os.pipe()
    pid = start(run, folder, None, lambda: os.write(there, b"x"))
    os.read(here, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(here)
    os.close(there)
    return os.WIFSIGNALED(status)


def kill_at_random(out: Path, n: int) -> None:
    begun: list[float] = []

    def timed(folder: Path) -> float:
        run(folder, None, lambda: begun.append(time.monotonic()))
        return time.monotonic() - begun[-1]

    torch.set_num_threads(1)
    length, rng = timed(out / "timed"), random.Random(n)
    for i in range(n):
        seconds = length * 0.9 * (i + rng.random()) / n
        while not kill_after(out / f"random {i}", seconds):  # a machine is not always as quick
            shutil.rmtree(out / f"random {i}")
            seconds *= 0.7
        assert in_child(out / f"random {i}", None) == 0, i


def main() -> None:
    let_no_child_hold_a_lock()
    out = Path(sys.argv[1])
    for name, kill in CASES.items():
        if kill:
            status = in_child(out / name, kill)
            assert os.WIFSIGNALED(status), (name, status)
            assert os.WTERMSIG(status) == signal.SIGKILL
        assert in_child(out / name, None) == 0, name
    kill_at_random(out, int(sys.argv[2]))


if __name__ == "__main__":
    assert trainer_module.LTETrainer is LTETrainer
    main()
