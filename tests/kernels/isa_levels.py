"""The ISA levels that this machine runs beside its best, for tests that start a process for each."""

import pytest

from ltepass.kernels.cpu import build

# Each is built: the one that test_build needs as well always, the others with the slow tests.
LEVELS = [
    pytest.param(v, marks=[] if v == "x86-64-v4" else pytest.mark.slow) for v in build.levels() if v != build.isa()
]
