"""Two processes (DDP): torchrun trains to the routers that one process trains, at the same global batch.

The file starts torchrun on itself; by hand: torchrun --nproc_per_node 2 11_two_processes.py FOLDER
or: accelerate launch --multi_gpu --num_processes 2 11_two_processes.py FOLDER (which works on a CPU too)

With FSDP2 each process holds a share of the weights. Save the transformed model, then in `train` take
AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(fsdp_size=2)) in its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import ltepass

BATCH = 8  # of all processes together


def train(folder: Path, processes: int) -> dict[str, float]:
    """Thresholds by site, after both stages."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    rows = (torch.arange(64)[:, None] + torch.arange(24)) % 64  # sequences that count
    # before the processes share anything: every one makes the same model
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=8), calibration=[rows])
    args = TrainingArguments(
        str(folder / "log"),
        per_device_train_batch_size=BATCH // processes,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=100,
        ddp_backend="gloo" if processes > 1 else None,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    settings = ltepass.LTESettings(soft_steps=3, hard_steps=3)
    ltepass.LTETrainer(model=model, args=args, lte=settings, train_dataset=data, eval_dataset=data[:16]).fit()
    report = ltepass.report(model)
    return {name: scores.threshold or 0.0 for name, scores in report.scores.items()}


def main() -> None:
    if "RANK" in os.environ:  # one of torchrun's
        folder = Path(sys.argv[1])
        found = train(folder, int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            torch.save(found, folder / "thresholds.pt")
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        subprocess.run([*command, __file__, scratch], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        two = torch.load(Path(scratch) / "thresholds.pt")
        one = train(Path(scratch), 1)
    for name, threshold in one.items():
        print(f"{name}: threshold {threshold:.6f} by one process, {two[name]:.6f} by two")
    assert all(abs(two[name] - threshold) < 1e-5 for name, threshold in one.items())


if __name__ == "__main__":
    main()
