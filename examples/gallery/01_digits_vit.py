"""Images: transformers' ViT on the 1,797 scanned digits of scikit-learn, dense and routed.

python -m examples.gallery.01_digits_vit          about two minutes of one core a seed
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from examples.gallery.dense_and_routed import Options, Task, compare
from examples.gallery.rows import here, keep

OPTIONS = Options(dense=400, soft=80, hard=80, batch=32, rate=2e-3)
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
HELD_OUT, TEST = 200, 400


def load() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in -1..1, and the digits that they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


def vit(classes: int = 10) -> nn.Module:
    """Patches of 2 x 2: 16 tokens, and one that is classified."""
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": classes, **SIZES}
    model: nn.Module = ViTForImageClassification(ViTConfig(initializer_range=0.1, **sizes))  # 0.02 is for wide layers
    return model


def split(n: int, seed: int, held_out: int = HELD_OUT, test: int = TEST) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to train on, to place thresholds on, and to test on."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[held_out + test :], order[:held_out], order[held_out : held_out + test]


def task(images: Tensor, digits: Tensor, seed: int, options: Options, parts: tuple[Tensor, Tensor, Tensor]) -> Task:
    """parts: of `split`."""
    training, held_out, test = parts
    torch.manual_seed(seed)
    model = vit()

    def loss(model: nn.Module, step: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = training[torch.randint(len(training), (options.batch,), generator=g)]
        return nn.functional.cross_entropy(model(pixel_values=images[rows]).logits, digits[rows])

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        found: Tensor = model(pixel_values=images[test]).logits.argmax(-1)
        return (found == digits[test]).float().mean().item()

    facts = {"example": "01_digits_vit", "data": "scikit-learn: digits", "model": "ViTForImageClassification"}
    return Task(
        model=model,
        loss=loss,
        score=accuracy,
        batches=[{"pixel_values": images[rows]} for rows in training[:400].split(200)],
        held_out=[{"pixel_values": images[rows]} for rows in held_out.split(200)],
        facts={**facts, "metric": "accuracy", "seed": seed, **here("scikit-learn")},
    )


def main(options: Options = OPTIONS) -> None:
    images, digits = load()
    rows = []
    for seed in options.seeds:
        for row in compare(task(images, digits, seed, options, split(len(images), seed)), options):
            print(f"seed {seed} {row.side} {row.target:.0%} {row.stage}: {row.metric} {row.value:.4f}", flush=True)
            rows.append(row)
        keep(rows)


if __name__ == "__main__":
    main()
