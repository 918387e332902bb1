"""What both trainings share: the same batches in the same order, the loop, its progress bar, and Ctrl-C.

Ctrl-C asks a training to stop after its present step; the step, the weights and the optimizer are then on the disk, and
the same call goes on from there.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ltepass.demo.results import Losses
from ltepass.errors import TrainingError
from ltepass.whole_file import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNING_RATE = 3e-4  # of 1e-4 and 3e-4 the better after 40 steps of 1,024 tokens on SmolLM2-135M (LTE 17.4 and 17.0)
MAX_NORM = 1.0
WARMUP = 0.06  # share of the steps, as in the paper
OnStep = Callable[[int, float], None]


def batches(blocks: Tensor, batch: int, steps: int, seed: int) -> list[Tensor]:
    """`steps` batches [batch, T] of blocks [n, T] in the seed's order; no block twice before all were used."""
    rounds = 1 + steps * batch // len(blocks)
    orders = [torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed + i)) for i in range(rounds)]
    order = torch.cat(orders)[: steps * batch]
    return [blocks[index] for index in torch.split(order, batch)]


@contextmanager
def ctrl_c_between_steps(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C stops at once, and loses the stage."""
    asked = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step; press Ctrl-C again to stop at once and lose this stage")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress_bar(console: Console, what: str, steps: int) -> Iterator[OnStep]:
    """A bar that shows the step, the loss and the time left."""
    columns = (TextColumn("    {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda step, loss: bar.update(task, completed=step + 1, description=f"{what}, loss {loss:.3f}")


def tune(
    model: PreTrainedModel,
    steps: Sequence[Tensor],
    state_file: Path,
    on_step: OnStep,
    asked_to_stop: Callable[[], bool],
) -> Losses:
    """Fine-tune in place with AdamW, one batch [B, T] a step; returns (step, loss in nats per token) for each.

    Raises KeyboardInterrupt once state_file holds where it stopped; TrainingError where the loss is not finite.
    """
    model.train()
    # Its gradient is a tenth of a step's time, and rare tokens learn nothing from so little text.
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = _resume(model, optimizer, state_file)
    for step in range(len(losses), len(steps)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step, len(steps))
        ids = steps[step].to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {step}; expected a number; try another --seed")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((step, loss.item()))
        on_step(step, loss.item())
        if asked_to_stop() and step + 1 < len(steps):
            save_state(state_file, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
            raise KeyboardInterrupt
    state_file.unlink(missing_ok=True)
    model.eval()
    return losses


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over WARMUP of the steps, then linear to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def save_state(file: Path, state: Mapping[str, object]) -> None:
    with whole_file(file) as scratch:
        torch.save(state, scratch)


def _resume(model: PreTrainedModel, optimizer: torch.optim.Optimizer, state_file: Path) -> Losses:
    if not state_file.exists():
        return []
    state = torch.load(state_file, map_location=model.device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [(step, loss) for step, loss in state["losses"]]
