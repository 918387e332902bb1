"""Medical images: grey and white matter on slices of a brain, by transformers' SegFormer and UperNet.

python -m examples.gallery.09_brain_upernet          about four minutes of one core a seed

nilearn carries the MNI152 template, the mean of 152 scanned heads, with maps of grey and white matter. Its axial
slices, 2 mm apart, are cut into blocks of six neighbours: of every three blocks the third is tested, one of the others
is kept for thresholds, and the rest is learnt from. A slice is seen as a poor scanner gives it, brighter to one side
and with noise: on the clean mean intensity alone tells the two apart (Dice 0.96). SegFormer's FFNs have a convolution
between their linears and are refused; UperNet's Swin transformer has plain ones, which are routed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import ltepass
from examples.gallery.dense_and_routed import Options, Task, compare, row, train
from examples.gallery.rows import Row, here, keep
from ltepass.errors import NoFFNFoundError

OPTIONS = Options(dense=300, soft=60, hard=60, batch=8, rate=2e-3)
SIDE = 96  # of an image, in voxels of 2 mm
FIRST, BLOCK, BLOCKS, HELD_OUT = 8, 6, 10, 4  # slices; the last is the block that thresholds are placed on
GREY, WHITE = 1, 2
SLOPE, NOISE, STEPS = 0.3, 0.1, 64  # of brightness from side to side, of a voxel; steps of intensity


class Slices(NamedTuple):
    """Intensities [n, 1, SIDE, SIDE] from 0 to about 1, and what each voxel is [n, SIDE, SIDE]: 0, GREY or WHITE."""

    images: Tensor
    matter: Tensor


def load() -> Slices:
    """All BLOCKS * BLOCK slices, from the brain's foot to its top. A voxel is what more than its other maps say."""
    from nilearn import datasets

    loaders = (
        datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template,
    )  # fmt: skip
    head, grey, white = (torch.tensor(load(resolution=2).get_fdata(), dtype=torch.float32) for load in loaders)
    matter = torch.stack([1 - grey - white, grey, white]).argmax(0)
    across, along, up = slice(1, 1 + SIDE), slice(10, 10 + SIDE), slice(FIRST, FIRST + BLOCKS * BLOCK)
    images, kinds = (volume[across, along, up].permute(2, 0, 1) for volume in (head, matter))
    return Slices(images[:, None], kinds)


def scanned(images: Tensor, seed: int) -> Tensor:
    """The same [n, 1, H, W], each brighter to one side, and with noise."""
    g = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(len(images), 1, 1, 1, generator=g)
    down, right = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in images.shape[2:]), indexing="ij")
    field = 1 + SLOPE * (angle.cos() * down + angle.sin() * right)
    return images * field + NOISE * torch.randn(images.shape, generator=g)


def split(slices: Slices) -> tuple[Slices, Slices, Slices]:
    """To train on, to place thresholds on, to test on: whole blocks of neighbours."""
    block = torch.arange(len(slices.images)) // BLOCK
    test, held = block % 3 == 2, block == HELD_OUT

    def at(rows: Tensor) -> Slices:
        return Slices(slices.images[rows], slices.matter[rows])

    return at(~test & ~held), at(held), at(test)


def upernet() -> nn.Module:
    """On a Swin transformer, whose tokens of 4 x 4 voxels are merged twice."""
    swin = SwinConfig(
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        embed_dim=32,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=6,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = UperNetConfig(
        backbone_config=swin, hidden_size=32, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=3
    )
    model: nn.Module = UperNetForSemanticSegmentation(config)
    return model


def segformer() -> nn.Module:
    model: nn.Module = SegformerForSemanticSegmentation(
        SegformerConfig(
            num_channels=1,
            num_labels=3,
            depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 64, 64],
            num_attention_heads=[1, 2, 4, 4],
            decoder_hidden_size=64,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        )
    )
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """[n, 3, H, W] of voxels; SegFormer answers at a quarter of that."""
    found: Tensor = model(pixel_values=images).logits
    return nn.functional.interpolate(found, size=images.shape[2:], mode="bilinear")


def dice(found: Tensor, true: Tensor, kind: int) -> float:
    """Twice the voxels that both call `kind`, over those of one and of the other; of all slices together."""
    ours, theirs = found == kind, true == kind
    return (2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())).item()


def by_intensity(training: Slices, images: Tensor) -> Tensor:
    """[n, H, W]: what training has most often at each intensity."""

    def steps(of: Tensor) -> Tensor:
        return (of.clamp(0, 1.5) / 1.5 * (STEPS - 1)).long()

    counts = torch.zeros(STEPS, 3).index_put(
        (steps(training.images).flatten(), training.matter.flatten()), torch.tensor(1.0), accumulate=True
    )
    return counts.argmax(1)[steps(images)][:, 0]


@dataclass
class Scores:
    """Dice of grey matter, and in `white` of the other."""

    test: Slices
    white: float = 0.0  # of what was scored last

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        return self.of(logits(model, self.test.images).argmax(1))

    def of(self, found: Tensor) -> float:
        self.white = dice(found, self.test.matter, WHITE)
        return dice(found, self.test.matter, GREY)


def task(slices: Slices, make: Callable[[], nn.Module], seed: int, options: Options) -> tuple[Task, Scores]:
    """slices: clean ones. Each step's are scanned anew; those of thresholds and tests once."""
    training, held, test = split(slices)
    scores = Scores(Slices(scanned(test.images, -1), test.matter))
    torch.manual_seed(seed)
    model = make()

    def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(training.images), (size,), generator=g)
        flip = [2] if torch.rand(1, generator=g) < 0.5 else []  # left for right
        images = scanned(training.images[rows], seed * 1_000_003 + step)
        return images.flip(flip), training.matter[rows].flip([1] if flip else [])

    def loss(model: nn.Module, step: int) -> Tensor:
        images, matter = batch(step, options.batch)
        return nn.functional.cross_entropy(logits(model, images), matter)

    facts = {"example": "09_brain_upernet", "data": "nilearn: MNI152 slices", "model": type(model).__name__}
    made = Task(
        model=model,
        loss=loss,
        score=scores,
        batches=[{"pixel_values": batch(-1 - part, 8)[0]} for part in range(4)],
        held_out=[{"pixel_values": scanned(held.images, -2)}],
        facts={**facts, "metric": "Dice, grey matter", "seed": seed, **here("nilearn")},
    )
    return made, scores


def refused(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Why, in the words of the first refusal (AssertionError where an FFN is found)."""
    try:
        ltepass.transform(model, inputs)
    except NoFFNFoundError as error:
        return str(error).splitlines()[1].strip()
    raise AssertionError(f"expected no FFN in a {type(model).__name__}")


def rows_of(slices: Slices, seed: int, options: Options) -> Iterator[Row]:
    """Each with Dice of grey matter, and again with that of white matter."""
    start = time.perf_counter()
    work, scores = task(slices, segformer, seed, options)
    note = refused(work.model, work.batches[0])
    train(work.model, work, range(options.dense + options.soft + options.hard), options.rate)
    value = scores(work.model)
    yield from both(row(work, side="dense", value=value, seconds=time.perf_counter() - start, note=note), scores)
    work, scores = task(slices, upernet, seed, options)
    training = split(slices)[0]
    value = scores.of(by_intensity(training._replace(images=scanned(training.images, -3)), scores.test.images))
    yield from both(row(work, side="intensity alone", value=value, seconds=0.0), scores)
    for found in compare(work, options):
        yield from both(found, scores)


def both(found: Row, scores: Scores) -> Iterator[Row]:
    """found: of what was scored last."""
    yield found
    yield replace(found, metric="Dice, white matter", value=scores.white, seconds=0.0)


def main(options: Options = OPTIONS) -> None:
    slices, rows = load(), []
    for seed in options.seeds:
        for found in rows_of(slices, seed, options):
            about = f"seed {seed} {found.model} {found.side} {found.target:.0%} {found.stage}"
            print(f"{about}: {found.metric} {found.value:.4f} ({found.seconds:.0f} s)", flush=True)
            rows.append(found)
        keep(rows)


if __name__ == "__main__":
    main()
