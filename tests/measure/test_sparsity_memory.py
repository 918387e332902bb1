"""What `measure_sparsity` needs does not grow with the tokens: a million of them, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from tests.child import ROOT, environment

# A router of 256 experts: the logits of a million tokens would be a gigabyte, and nobody may keep them.
PROGRAM = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
import ltepass
from ltepass.measure.memory import peak_memory

torch.manual_seed(0)
torch.set_num_threads(1)
sizes = {"vocab_size": 61, "hidden_size": 8, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()
ltepass.transform(model, config=ltepass.LTEConfig(group_size=1, grouping="identity"))

def batches(tokens):
    for _ in range(tokens // 4096):
        yield torch.randint(0, 61, (64, 64))

ltepass.measure_sparsity(model, batches(4096))
before = peak_memory()
ltepass.measure_sparsity(model, batches(2**20))
print(before, peak_memory())
"""


def test_a_million_tokens_stay_under_200_megabytes() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(int, done.stdout.split())
    assert after - before < 200e6, f"{(after - before) / 1e6:.0f} MB more than for 4,096 tokens"
    print(f"{(after - before) / 1e6:.1f} MB more than for 4,096 tokens; the whole process {after / 1e6:.0f} MB")
