"""A model that generates for long keeps its memory: what one call takes, the next ones use again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: other tests' memory would move beside it.
SOAK = """
import gc, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
import ltepass

scope, calls, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=61, hidden_size=24, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None
)
model = AutoModelForCausalLM.from_config(config).eval()
ltepass.transform(model, config=ltepass.LTEConfig(group_size=6, grouping="identity"))
ltepass.set_mode(model, "hard")
ltepass.lower(model, scope=scope)
more = {"cache_implementation": "static"} if scope == "model" else {}

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

for i in range(1, calls + 1):
    ids = torch.randint(0, 60, (1, 3 + i % 5))  # 60 pads: it would ask for a mask, and another graph
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=60, **more)
    assert out.shape[1] == ids.shape[1] + tokens
    if i in (calls // 5, calls):
        gc.collect()
        print(resident(), flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set of Linux")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scope", ["ffn", pytest.param("model", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("calls", "tokens"), [(50, 20), pytest.param(50, 200, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_memory_after_50_calls_is_that_after_10(scope: str, calls: int, tokens: int) -> None:
    command = [sys.executable, "-c", SOAK, scope, str(calls), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    early, late = map(int, done.stdout.split())
    assert late <= 1.01 * early, (early, late)
