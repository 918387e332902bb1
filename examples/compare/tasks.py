"""Dense against LTE on tasks: instruction following (loss on answers only), classification (which text is this from).

    python -m examples.compare.tasks                                     the tiny model, minutes
    python -m examples.compare.tasks --preset small --texts FOLDER       SmolLM2-135M with its own chat template

Language modelling is the frontier's. Instructions are made from the Python reference: asked for a topic, the answer is
its text; whole topics are held out. Passages to classify come from the three texts' own train and test slices.
"""

from __future__ import annotations

import copy
import csv
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import ltepass
from examples.compare import models
from examples.compare.frontier_rows import spread_of
from examples.compare.presets import PRESETS
from examples.compare.study import DEVICE, Budget, Recipe, load_data
from examples.compare.tuning import DenseTrainer, arguments, freeze_embeddings, run_stages
from ltepass.calibration.refit_down import warm_start

FIELDS = "preset task method target seed tokens metric value ffn_sparsity seconds".split()
IGNORED = -100
Example = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """train, test: rows of model inputs, padded to one length; metric: "perplexity of answers" or "accuracy"."""

    name: str
    metric: str
    train: list[Example]
    test: list[Example]


def instruction_task(tokenizer: Any, budget: Budget, seed: int) -> Task:
    """Topics of the Python reference as questions, the first lines of their text as answers."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    cut = len(names) * 3 // 4
    train = [_dialogue(tokenizer, name, topics[name], budget.length) for name in names[:cut]]
    test = [_dialogue(tokenizer, name, topics[name], budget.length) for name in names[cut:]]
    generator = random.Random(seed)
    wanted = budget.steps * budget.batch
    rows = [train[i % len(train)] for i in range(wanted)]
    generator.shuffle(rows)
    return Task("instructions", "perplexity of answers", rows, test[: 4 * budget.test])


def _dialogue(tokenizer: Any, name: str, answer: str, length: int) -> Example:
    question = [{"role": "user", "content": f"What does the Python reference say about '{name}'?"}]
    if hasattr(tokenizer, "apply_chat_template"):
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    else:
        prompt = f"<user>{question[0]['content']}<assistant>"
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"][: length // 2]
    tail = tokenizer(answer.strip()[: 8 * length], add_special_tokens=False)["input_ids"][: length - len(head)]
    pad = length - len(head) - len(tail)
    return {
        "input_ids": torch.tensor(head + tail + [0] * pad),
        "attention_mask": torch.tensor([1] * (length - pad) + [0] * pad),
        "labels": torch.tensor([IGNORED] * len(head) + tail + [IGNORED] * pad),
    }


def classification_task(tokenizer: Any, budget: Budget, texts: Path | None, seed: int) -> Task:
    """Passages of a quarter of a block: which of the texts is it from."""
    data = load_data(budget, texts, tokenizer, seed)
    short = max(16, budget.length // 4)
    slices = {name: _train_slice(tokenizer, budget, texts, name) for name in data.test}
    rows = [
        {"input_ids": block, "labels": torch.tensor(label)}
        for label, blocks in enumerate(slices.values())
        for block in blocks[:, :short]
    ]
    random.Random(seed).shuffle(rows)
    test = [
        {"input_ids": part, "labels": torch.tensor(label)}
        for label, blocks in enumerate(data.test.values())
        for part in blocks.flatten().split(short)[: 16 * budget.test]
        if len(part) == short
    ]
    return Task("classification", "accuracy", rows[: budget.steps * budget.batch], test)


def _train_slice(tokenizer: Any, budget: Budget, texts: Path | None, name: str) -> Tensor:
    from ltepass.corpora import corpora, token_blocks

    chars = 8 * budget.length * (budget.steps * budget.batch // 3 + 8)
    return token_blocks(tokenizer, corpora(texts, chars, 1)[name][0], budget.length)


def model_of(task: Task, budget: Budget, work: Path, train: Tensor, classes: int) -> Any:
    """The language model, or its decoder with a fresh classifier on the last token."""
    model = models.load(budget.model, work, train)
    if task.name == "classification":
        torch.manual_seed(0)
        head = AutoModelForSequenceClassification.from_config(_with_labels(model.config, classes))
        head.model.load_state_dict(model.model.state_dict())
        model = head.eval()
    return model.to(DEVICE)


def _with_labels(config: Any, classes: int) -> Any:
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = classes, 0  # no passage holds it
    return config


def tune(model: Any, task: Task, budget: Budget, folder: Path, seed: int, sparsity: float, recipe: Recipe) -> Any:
    """Dense where the sparsity is 0, else LTE by the recipe; the same rows in the same order."""
    if sparsity:
        rows = [{k: v for k, v in row.items() if k != "labels"} for row in task.train[: budget.calibration]]
        batches = [
            {k: torch.stack([r[k] for r in rows[i : i + 4]]).to(DEVICE) for k in rows[0]}
            for i in range(0, len(rows), 4)
        ]
        config = ltepass.LTEConfig(
            group_size=budget.group_size, target_sparsity=sparsity, budget=recipe.budget, seed=seed
        )
        ltepass.transform(model, config=config, calibration=batches)
        if recipe.warm:
            warm_start(model, torch.cat([b["input_ids"] for b in batches]))
    freeze_embeddings(model)
    if not sparsity:
        args = arguments(budget, folder, seed, budget.steps)
        DenseTrainer(model=model, args=args, train_dataset=task.train).train()
        return model.eval()
    run_stages(model, task.train, task.train[: budget.calibration], budget, folder, seed, recipe)
    return model


@torch.no_grad()
def measure(model: Any, task: Task, sparsity: float) -> tuple[float, float]:
    """(metric, FFN sparsity) on the test rows."""
    right, losses, count = 0, 0.0, 0
    for row in task.test:
        inputs = {k: v[None].to(DEVICE) for k, v in row.items()}
        out = model(**{k: v for k, v in inputs.items() if k != "labels"})
        if task.name == "classification":
            right += int(out.logits.argmax(-1) == inputs["labels"])
            continue
        labels = inputs["labels"][0, 1:]
        losses += float(nn.functional.cross_entropy(out.logits[0, :-1].float(), labels, reduction="sum"))
        count += int((labels != IGNORED).sum())
    value = right / len(task.test) if task.name == "classification" else float(torch.tensor(losses / count).exp())
    if not sparsity:
        return value, 0.0
    batches = [{k: v[None].to(DEVICE) for k, v in row.items() if k != "labels"} for row in task.test[:16]]
    shares = ltepass.measure_sparsity(model, batches)
    return value, statistics.fmean(shares.values())


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write_table(rows: Sequence[dict[str, str]], path: Path) -> None:
    lines = ["# Tasks", "", "Made by `examples/compare/tasks.py` from the CSV beside it; nothing here is typed.", ""]
    lines += [
        "| preset | task | metric | tokens or rows | dense | LTE (measured sparsity) |",
        "|---|---|---|---|---|---|",
    ]
    for preset, task in sorted({(r["preset"], r["task"]) for r in rows}):
        here = [r for r in rows if (r["preset"], r["task"]) == (preset, task)]
        dense = [float(r["value"]) for r in here if r["target"] == "0"]
        shown = []
        for target in sorted({r["target"] for r in here} - {"0"}, key=float):
            cell = [r for r in here if r["target"] == target]
            sparsity = statistics.fmean(float(r["ffn_sparsity"]) for r in cell)
            shown.append(f"{float(target):.0%}: {spread_of([float(r['value']) for r in cell])} ({sparsity:.1%})")
        facts = here[0]
        lines.append(
            f"| {preset} | {task} | {facts['metric']} | {int(facts['tokens']):,} | "
            f"{spread_of(dense) if dense else '-'} | {'; '.join(shown)} |"
        )
    path.write_text("\n".join(lines) + "\n")


def main(
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "ablation",
    texts: Annotated[Path | None, typer.Option(help="Folder of *.txt files; else text that ships with Python.")] = None,
    results: Annotated[Path, typer.Option(help="RESULTS.csv and .md are written.")] = Path("tasks"),
    work: Annotated[Path, typer.Option(help="Where a tiny model is kept.")] = Path("frontier-work"),
    points: Annotated[str, typer.Option(help="FFN sparsities; 0 is dense.")] = "0,0.5,0.8",
    seeds: Annotated[int, typer.Option(help="How many.")] = 1,
) -> None:
    budget, path = PRESETS[preset].budget, results.with_suffix(".csv")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = models.tokenizer(budget.model)
    for seed in range(seeds):
        data = load_data(budget, texts, tokenizer, seed)
        for task in (instruction_task(tokenizer, budget, seed), classification_task(tokenizer, budget, texts, seed)):
            for point in map(float, points.split(",")):
                key = (preset, task.name, f"{point:g}", str(seed))
                if key in {(r["preset"], r["task"], r["target"], r["seed"]) for r in read_rows(path)}:
                    continue
                start = time.perf_counter()
                model = model_of(task, budget, work, data.train, len(data.test))
                model = tune(model, task, budget, work / "log", seed, point, PRESETS[preset].recipe)
                value, sparsity = measure(model, task, point)
                row = {
                    "preset": preset, "task": task.name, "method": "lte" if point else "dense", "target": f"{point:g}",
                    "seed": seed, "tokens": sum(r["input_ids"].numel() for r in task.train), "metric": task.metric,
                    "value": f"{value:.4f}", "ffn_sparsity": f"{sparsity:.4f}",
                    "seconds": f"{time.perf_counter() - start:.0f}",
                }  # fmt: skip
                new = not path.exists()
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(f"{task.name} {point:g} seed {seed}: {task.metric} {value:.3f}", flush=True)
    write_table(read_rows(path), results.with_suffix(".md"))
    print(results.with_suffix(".md").read_text())


if __name__ == "__main__":
    typer.run(main)
