"""The two stages of the paper in a training loop of one's own: no Trainer, a model that learns in seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ltepass

SOFT_STEPS, HARD_STEPS, TARGET = 60, 40, 0.7
LAMBDA = 1e-4  # weight of the separability loss; the controller finds that of the efficiency loss


def batch(seed: int, rows: int = 8, length: int = 32) -> Tensor:
    """Token ids [rows, length]: sequences that count up by 1, 2 or 3 from where they start, modulo the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    start, step = torch.randint(0, 64, (rows, 1), generator=g), torch.randint(1, 4, (rows, 1), generator=g)
    return (start + step * torch.arange(length)) % 64


def train(model: Any, steps: range, optimizer: torch.optim.Optimizer, controller: Any = None) -> float:
    """Mean task loss of the last ten steps. controller: of the soft stage, which has the two auxiliary losses."""
    losses = []
    for step in steps:
        ids = batch(step)
        task = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss = task
        if controller is not None:
            auxiliary = ltepass.take_auxiliary(model, ltepass.label_mask(ids))  # sums over tokens
            loss = task + (controller.eta * auxiliary.efficiency + LAMBDA * auxiliary.separability) / auxiliary.tokens
            controller.update(float(auxiliary.sparsity / auxiliary.tokens), (step - steps.start + 1) / len(steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(task.item())
    return float(sum(losses[-10:]) / 10)


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    held_out = [batch(-1), batch(-2)]
    print(f"dense:  task loss {train(model, range(200), torch.optim.AdamW(model.parameters(), 3e-3)):.3f}")

    ltepass.transform(model, config=ltepass.LTEConfig(group_size=8, target_sparsity=TARGET))
    ltepass.calibrate(model, [batch(step) for step in range(8)])

    ltepass.begin_stage(model, "soft")  # before the optimizer: a stage says what learns
    controller = ltepass.SparsityController(target=TARGET)
    soft = range(1000, 1000 + SOFT_STEPS)
    print(f"soft:   task loss {train(model, soft, torch.optim.AdamW(model.parameters(), 1e-3), controller):.3f}")
    shares = ltepass.settle(model, held_out, TARGET)  # thresholds at the target, hard gates

    ltepass.begin_stage(model, "hard")
    learning = [p for p in model.parameters() if p.requires_grad]
    hard = range(2000, 2000 + HARD_STEPS)
    print(f"hard:   task loss {train(model, hard, torch.optim.AdamW(learning, 1e-3)):.3f}")
    shares = ltepass.settle(model, held_out, TARGET)
    print(f"inactive neurons on text that was held out: {sum(shares.values()) / len(shares):.1%}")
    model.eval()
    print(f"perplexity there: {ltepass.perplexity(model, torch.cat(held_out)):.3f}")


if __name__ == "__main__":
    main()
