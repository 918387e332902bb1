"""The same seed gives the same bits, whatever the number of threads: groups, routers, tables, and what is lowered.

torch's own products of matrices may round otherwise with another number of threads, for some shapes (measured: fp32
5 x 64 x 192 and 100 x 20 x 30, none with every side of 256 or more), and so do its LayerNorm's gradient and, on a Xeon,
attention's with heads of 48; the shapes here are such that they do not. Sums over tokens, which differ there too, are
ours and made on one thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

CODE = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
import ltepass
from ltepass.calibration.refit_down import warm_start
threads, out = int(sys.argv[1]), {}
torch.set_num_threads(threads)
sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
text = [torch.randint(0, 61, (8, 128), generator=torch.Generator().manual_seed(i)) for i in range(2)]
for name, config in {
    "layer": ltepass.LTEConfig(group_size=8),
    "model": ltepass.LTEConfig(group_size=8, budget="model", grouping="kmeans"),
}.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=61, **sizes)).eval()
    ltepass.transform(model, config=config, calibration=text)
    if name == "layer":
        warm_start(model, text[0])
    out |= {f"{name}.{k}": v.clone() for k, v in model.state_dict().items()}
    ltepass.set_mode(model, "hard")
    ltepass.lower(model)
    with torch.no_grad():
        out[f"{name}.lowered"] = model(text[0]).logits
        out[f"{name}.token"] = model(text[0][:1, :1]).logits
assert torch.get_num_threads() == threads
torch.save(out, sys.argv[2])
"""


def test_everything_is_bitwise_the_same_with_1_and_3_threads(tmp_path: Path) -> None:
    results = []
    for threads in (1, 3):
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", CODE, str(threads), str(tmp_path / f"{threads}.pt")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(tmp_path / f"{threads}.pt"))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert [k for k, v in other.items() if not torch.equal(v.nan_to_num(), results[0][k].nan_to_num())] == []
