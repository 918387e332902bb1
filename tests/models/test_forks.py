"""A forked child: what it has of its parent's threads, locks and models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ltepass
from ltepass.errors import ConcurrencyError
from ltepass.threads import locks
from tests.child import environment
from tests.models.test_threads import with_tables
from tests.models.zoo import ids, logits, transformed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_has_the_model_to_itself() -> None:
    """The child's model stands where that call left it, and is refused; its other models, and all locks, are free."""
    model, spare = transformed("llama"), transformed("llama")

    def batches() -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(1) as other, locks.tracing, locks.classes:
            code = other.submit(forked, child).result()
        assert code == 0
        yield ids()

    def child() -> None:
        with pytest.raises(ConcurrencyError):
            logits(model)
        ltepass.lower(spare)
        ltepass.set_sparsity(with_tables(model), 0.5)

    ltepass.measure_sparsity(model, batches())


def forked(work: Callable[[], None]) -> int:
    """The exit code of a child that does this; it is killed after a while."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


FORK = """
import os, torch, ltepass
from tests.models.zoo import ids, logits, transformed
from tests.typed import lte_state, routed
model = ltepass.lower(transformed("llama"))
torch.set_num_threads(2)
x = ids(4, 40)
y = logits(model, x)
one = torch.ops.ltepass.routed_ffn
wide = (torch.randn(1, 512), torch.randn(64, 512), None, torch.zeros(()), torch.randn(2048, 512), None, None, None,
        torch.randn(512, 2048), None, "silu")
with torch.no_grad():
    z = one(*wide)
child = os.fork()
if child == 0:
    with torch.no_grad():
        os._exit(0 if torch.equal(logits(model, x), y) and torch.equal(one(*wide), z) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_the_same_and_does_not_hang() -> None:
    """Its OpenMP pool has no threads any more: with two it would wait for ever."""
    env = environment(OMP_NUM_THREADS="2")
    done = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0"], done.stderr[-2000:]
