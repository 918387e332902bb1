"""Run by test_robust in a process of its own: gradients of one soft step, by one process, by DDP and by FSDP2 of two.

python -m tests.training.distributed_driver FOLDER ROUTER: FOLDER/{single,ddp,fsdp}.pt hold gradients by parameter name,
FOLDER/rank{0,1}.pt the routers of each process after a `fit` of two, FOLDER/alone.pt those after one process's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

import ltepass
from ltepass.routed.routed import routers_of
from ltepass.training.auxiliary_loss import take_auxiliary
from ltepass.training.labels import label_mask
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage
from ltepass.training.trainer import LTETrainer
from tests.training.learning_cases import copied_text, small_llama

ROWS, ETA, LAM = 8, 0.3, 0.5


def model_and_rows(config: ltepass.LTEConfig) -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = ltepass.transform(small_llama().eval(), config=config, calibration=copied_text(32, 5).split(16))
    begin_stage(model, "soft")
    ids = copied_text(ROWS, 21)
    labels = ids.clone()
    for i in range(ROWS):
        labels[i, : 3 * i] = -100  # unequal counts: a mean per process would be wrong
    return model.train(), ids, labels


def by_trainer(config: ltepass.LTEConfig, folder: Path, batch: int) -> dict[str, torch.Tensor]:
    model, ids, labels = model_and_rows(config)
    kept: dict[str, torch.Tensor] = {}

    class Keeps(LTETrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(
                lambda *a: kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            )
            return optimizer

    args = TrainingArguments(
        str(folder / "log"), max_steps=1, per_device_train_batch_size=batch, max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-3,
        **({"ddp_backend": "gloo"} if dist_size() > 1 else {}),
    )  # fmt: skip
    rows = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    trainer = Keeps(model=model, args=args, train_dataset=rows, lte=LTESettings(eta=ETA, lam=LAM))
    assert trainer.accelerator.num_processes == dist_size()
    trainer.train()
    return kept


def settled(config: ltepass.LTEConfig, folder: Path) -> dict[str, torch.Tensor]:
    """A whole fit, cuts and all; every process writes what its own routers ended with."""
    model, _, _ = model_and_rows(config)
    ltepass.set_hidden_sparsity(model, 0.2, copied_text(16, 7).split(8))
    args = TrainingArguments(
        str(folder / "log"), max_steps=2, per_device_train_batch_size=4 // dist_size(), per_device_eval_batch_size=2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        **({"ddp_backend": "gloo"} if dist_size() > 1 else {}),
    )  # fmt: skip
    train, held_out = ([{"input_ids": a, "labels": a} for a in copied_text(32, seed)] for seed in (3, 4))
    trainer = LTETrainer(model=model, args=args, train_dataset=train, eval_dataset=held_out, lte=LTESettings())
    trainer.fit()
    ended = {f"{i}.{n}": t for i, r in enumerate(routers_of(model)) for n, t in r.state_dict().items()}
    ended["log"] = torch.tensor([v for entry in trainer.state.log_history for k, v in entry.items() if "held_out" in k])
    if dist_size() > 1:
        torch.save(ended, folder / f"rank{os.environ['RANK']}.pt")
    return ended


def dist_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def by_fsdp(config: ltepass.LTEConfig) -> dict[str, torch.Tensor]:
    rank, world = int(os.environ["RANK"]), dist_size()
    dist.init_process_group("gloo")
    model, ids, labels = model_and_rows(config)
    items = label_mask(labels).sum()
    try:
        for layer in model.model.layers:
            fully_shard(layer)
    except ValueError as refusal:
        return {str(refusal): torch.tensor(0)}
    fully_shard(model)
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    loss = model(input_ids=ids[mine], labels=labels[mine], num_items_in_batch=items).loss
    aux = take_auxiliary(model, label_mask(labels[mine]))
    loss = loss + (ETA * aux.efficiency + LAM * aux.separability) / items
    (loss * world).backward()  # FSDP takes the mean over processes
    assert all(type(p).__name__ == "DTensor" for r in routers_of(model) for p in r.parameters())
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def in_children(world: int, file: Path, work: Callable[[], dict[str, torch.Tensor]]) -> None:
    """Forked children, one per rank; the first writes what it got. Nothing has used threads before."""
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                if world > 1:
                    port = str(20000 + os.getppid() % 20000 + len(file.stem))
                    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                gradients = work()
                if rank == 0:
                    torch.save(gradients, file)
                if dist.is_initialized():
                    dist.barrier()
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    assert not any(statuses), (file.stem, statuses)


def main() -> None:
    out = Path(sys.argv[1])
    config = ltepass.LTEConfig(group_size=4, router=sys.argv[2])  # type: ignore[arg-type]  # which it checks
    in_children(1, out / "single.pt", lambda: by_trainer(config, out, ROWS))
    in_children(2, out / "ddp.pt", lambda: by_trainer(config, out, ROWS // 2))
    in_children(2, out / "fsdp.pt", lambda: by_fsdp(config))
    in_children(2, out / "settled.pt", lambda: settled(config, out))
    in_children(1, out / "alone.pt", lambda: settled(config, out))


if __name__ == "__main__":
    main()
