"""Two processes: torchrun trains to the routers that one process trains, at the same global batch.

By DDP, where each process holds the model, and by FSDP2, where each holds a share of its weights. The file starts
torchrun on itself; by hand: torchrun --nproc_per_node 2 11_two_processes.py FOLDER [shards]
or: accelerate launch --multi_gpu --num_processes 2 11_two_processes.py FOLDER (which works on a CPU too)

In a loop of your own, cut the model up by torch's `fully_shard` after transform (docs/quick_start.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

import ltepass

BATCH = 8  # of all processes together
ROWS = (torch.arange(64)[:, None] + torch.arange(24)) % 64  # sequences that count


def transformed() -> Any:
    """Before the processes share anything: each makes the same model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    return ltepass.transform(model, config=ltepass.LTEConfig(group_size=8), calibration=[ROWS])


def share(folder: Path, processes: int) -> Any:
    """The same model, of which each process loads a part: its weights have to be whole until they are saved."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        transformed().save_pretrained(folder / "transformed")
    dist.barrier()
    config = DistributedConfig(fsdp_size=processes)
    return AutoModelForCausalLM.from_pretrained(folder / "transformed", distributed_config=config)


def train(folder: Path, processes: int, *, shards: bool = False) -> dict[str, float]:
    """Thresholds by site, after both stages."""
    model = share(folder, processes) if shards else transformed()
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
        ddp_find_unused_parameters=False,  # a stage uses all that it trains
    )
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    settings = ltepass.LTESettings(soft_steps=3, hard_steps=3)
    ltepass.LTETrainer(model=model, args=args, lte=settings, train_dataset=data, eval_dataset=data[:16]).fit()
    held, all_of_them = (sum(size(p) for p in model.parameters()) for size in (local_numel, torch.numel))
    print(f"process {os.environ.get('RANK', '0')} of {processes} holds {held:,} of {all_of_them:,} numbers", flush=True)
    report = ltepass.report(model)
    return {name: scores.threshold or 0.0 for name, scores in report.scores.items()}


def local_numel(parameter: Any) -> int:
    """Of a shard, what this process holds."""
    return int(getattr(parameter, "_local_tensor", parameter).numel())


def main() -> None:
    if "RANK" in os.environ:  # one of torchrun's
        folder = Path(sys.argv[1])
        found = train(folder, int(os.environ["WORLD_SIZE"]), shards="shards" in sys.argv)
        if os.environ["RANK"] == "0":
            torch.save(found, folder / "thresholds.pt")
        return
    with tempfile.TemporaryDirectory() as scratch:
        one = train(Path(scratch), 1)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        engines = {"DDP": [], "FSDP2": ["shards"]}
        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19):
            print(f"no FSDP2: the Trainer of transformers {transformers.__version__} takes no shards, 5.19's does")
            del engines["FSDP2"]
        for engine, how in engines.items():
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*command, __file__, scratch, *how], check=True, env=env)
            two = torch.load(Path(scratch) / "thresholds.pt")
            for name, threshold in one.items():
                print(f"{name}: threshold {threshold:.6f} by one process, {two[name]:.6f} by two ({engine})")
            assert all(abs(two[name] - threshold) < 1e-5 for name, threshold in one.items())


if __name__ == "__main__":
    main()
