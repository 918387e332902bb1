from __future__ import annotations

import subprocess
import sys

from ltepass.measure.memory import peak_memory, resident
from tests.child import ROOT, environment


def test_the_peak_of_a_process_is_its_own_and_not_its_parents() -> None:
    held = b"1" * 1_000_000_000
    program = "from ltepass.measure.memory import peak_memory; print(peak_memory())"
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(held) < peak_memory()
    assert int(said) < len(held) / 2


def test_what_is_held_now_is_no_more_than_the_peak() -> None:
    now, peak = resident()
    assert 0 < now <= peak
