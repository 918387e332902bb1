"""Run by test_robust in a process of its own: gradients of one soft step, by one process, by DDP and by FSDP2 of two.

python -m tests.training.distributed_driver FOLDER ROUTER: FOLDER/{single,ddp,fsdp}.pt hold gradients by parameter name,
FOLDER/rank{0,1}.pt the routers of each process after a `fit` of two, FOLDER/alone.pt those after one process's;
FOLDER/loaded.pt after a `fit` of two that loaded a share each, FOLDER/looped{1,2}.pt after a loop of one's own under
FSDP2 of two processes, and of one; FOLDER/adapted{0,1}.pt all weights of each process after a `fit` by low-rank
updates; FOLDER/split.pt names what tensor parallelism was refused with.
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
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

import ltepass
from ltepass.errors import ShardedError
from ltepass.routed.routed import routers_of
from ltepass.training.auxiliary_loss import take_auxiliary
from ltepass.training.labels import label_mask
from ltepass.training.settings import LTESettings
from ltepass.training.stages import begin_stage, settle
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


def routers(model: Any) -> dict[str, torch.Tensor]:
    """Whole tensors, of shards too: every process has to call it."""
    named = {f"{i}.{n}": t for i, router in enumerate(routers_of(model)) for n, t in router.state_dict().items()}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in named.items()}


def with_cuts(config: ltepass.LTEConfig) -> Any:
    model, _, _ = model_and_rows(config)
    ltepass.set_hidden_sparsity(model, 0.2, copied_text(16, 7).split(8))
    return model


def alone(config: ltepass.LTEConfig, folder: Path) -> dict[str, torch.Tensor]:
    """`settled` by one process; folder/start is what it began with."""
    model = with_cuts(config)
    model.save_pretrained(folder / "start")
    return settled(model, folder)


def copies(config: ltepass.LTEConfig, folder: Path) -> dict[str, torch.Tensor]:
    """`settled` under DDP; every process writes what its own routers ended with."""
    ended = settled(with_cuts(config), folder)
    torch.save(ended, folder / f"rank{os.environ['RANK']}.pt")
    return ended


def adapted(config: ltepass.LTEConfig, folder: Path) -> dict[str, torch.Tensor]:
    """All weights, where each stage adds low-rank updates of its own and merges them; every process writes its own."""
    model, _, _ = model_and_rows(config)
    settled(model, folder, LTESettings(trainable="lora"))
    ended = {name: p.detach() for name, p in model.named_parameters()}
    torch.save(ended, folder / f"adapted{os.environ['RANK']}.pt")
    return ended


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """`settled`, of a model that transformers shards as it loads."""
    dist.init_process_group("gloo")
    config = DistributedConfig(fsdp_size=dist_size())
    try:
        model = AutoModelForCausalLM.from_pretrained(folder / "start", distributed_config=config)
    except ValueError as refusal:
        return {str(refusal): torch.tensor(0)}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    try:
        return settled(model, folder)
    except ShardedError as refusal:  # of the Trainer before transformers 5.19
        return {str(refusal): torch.tensor(0)}


def split(folder: Path) -> dict[str, torch.Tensor]:
    """What loading by transformers' tensor parallel plan says."""
    dist.init_process_group("gloo")
    try:
        AutoModelForCausalLM.from_pretrained(folder / "start", tp_plan="auto")
    except ShardedError as refusal:
        return {str(refusal): torch.tensor(0)}
    return {}


def settled(model: Any, folder: Path, lte: LTESettings | None = None) -> dict[str, torch.Tensor]:
    """What routers end a whole fit with, cuts and all."""
    args = TrainingArguments(
        str(folder / "log"), max_steps=2, per_device_train_batch_size=4 // dist_size(), per_device_eval_batch_size=2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        **({"ddp_backend": "gloo", "ddp_find_unused_parameters": lte is not None} if dist_size() > 1 else {}),
    )  # fmt: skip
    train, held_out = ([{"input_ids": a, "labels": a} for a in copied_text(32, seed)] for seed in (3, 4))
    trainer = LTETrainer(model=model, args=args, train_dataset=train, eval_dataset=held_out, lte=lte or LTESettings())
    trainer.fit()
    ended = routers(model)
    ended["log"] = torch.tensor([v for entry in trainer.state.log_history for k, v in entry.items() if "held_out" in k])
    return ended


def dist_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def shard(model: Any) -> None:
    """Raises ValueError of torch's where a parameter is a scalar."""
    dist.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def mine() -> slice:
    """This process's rows of a batch."""
    rank, world = int(os.environ.get("RANK", "0")), dist_size()
    return slice(rank * ROWS // world, (rank + 1) * ROWS // world)


def looped(folder: Path) -> dict[str, torch.Tensor]:
    """What routers end both stages with in a loop of one's own, under FSDP2 where there are several processes."""
    world, model = dist_size(), AutoModelForCausalLM.from_pretrained(folder / "start").train()
    try:
        if world > 1:
            shard(model)
    except ValueError as refusal:
        return {str(refusal): torch.tensor(0)}
    controller, held_out = ltepass.SparsityController(target=0.6), copied_text(8, 4).split(4)
    for stage, seed in (("soft", 100), ("hard", 200)):
        begin_stage(model, stage)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for step in range(2):
            ids = copied_text(ROWS, seed + step)
            items = label_mask(ids).sum()
            loss = model(input_ids=ids[mine()], labels=ids[mine()], num_items_in_batch=items).loss
            if stage == "soft":
                aux = take_auxiliary(model, label_mask(ids[mine()]))
                loss = loss + (controller.eta * aux.efficiency + LAM * aux.separability) / items
                seen = torch.stack([aux.sparsity, aux.tokens])
                if world > 1:
                    dist.all_reduce(seen)
                controller.update(float(seen[0] / seen[1]), (step + 1) / 2)
            optimizer.zero_grad()
            (loss * world).backward()  # FSDP takes the mean over processes
            optimizer.step()
        settle(model, held_out, 0.6)
    return routers(model)


def by_fsdp(config: ltepass.LTEConfig) -> dict[str, torch.Tensor]:
    world, (model, ids, labels) = dist_size(), model_and_rows(config)
    items = label_mask(labels).sum()
    try:
        shard(model)
    except ValueError as refusal:
        return {str(refusal): torch.tensor(0)}
    loss = model(input_ids=ids[mine()], labels=labels[mine()], num_items_in_batch=items).loss
    aux = take_auxiliary(model, label_mask(labels[mine()]))
    loss = loss + (ETA * aux.efficiency + LAM * aux.separability) / items
    (loss * world).backward()  # FSDP takes the mean over processes
    assert all(isinstance(p, DTensor) for r in routers_of(model) for p in r.parameters())
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
    in_children(1, out / "alone.pt", lambda: alone(config, out))
    in_children(2, out / "copies.pt", lambda: copies(config, out))
    in_children(2, out / "adapting.pt", lambda: adapted(config, out))
    in_children(2, out / "loaded.pt", lambda: loaded(out))
    in_children(2, out / "split.pt", lambda: split(out))
    in_children(1, out / "looped1.pt", lambda: looped(out))
    in_children(2, out / "looped2.pt", lambda: looped(out))


if __name__ == "__main__":
    main()
