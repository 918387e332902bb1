"""Reasoning: a small LLaMA does sums of several steps in lm-eval's harness, steps written or not, dense and routed.

python -m examples.gallery.10_reasoning          about fourteen minutes of one core a seed

A problem is a chain of three digits, added, taken away and multiplied from left to right, of each result the last
digit. The model learns both to write every result (`3 + 4 * 9 : 7 3 .`) and the last alone (`3 + 4 * 9 = 3 .`); lm-eval
(`pip install 'ltepass[eval]'`) asks for both, by two tasks that are written here, of problems that nothing was trained
on.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.gallery.dense_and_routed import Options, Task, compare, row
from examples.gallery.rows import Row, here, keep

OPTIONS = Options(dense=2400, soft=150, hard=150, batch=96, rate=2e-3)
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
NUMBERS, BASE, OPERATIONS = 3, 10, "+-*"
WORDS = ["<pad>", *map(str, range(BASE)), *OPERATIONS, "=", ":", "."]
ASKED = {"written": ":", "direct": "="}  # tasks, and the word that ends their prompts
HELD_OUT, TESTED = 256, 400


@dataclass(frozen=True)
class Problem:
    """numbers: NUMBERS of them; operations: one fewer."""

    numbers: tuple[int, ...]
    operations: str

    @property
    def results(self) -> list[int]:
        """After each operation, in 0..BASE-1."""
        found = [self.numbers[0]]
        for operation, number in zip(self.operations, self.numbers[1:], strict=True):
            value = {"+": found[-1] + number, "-": found[-1] - number, "*": found[-1] * number}[operation]
            found.append(value % BASE)
        return found[1:]

    def prompt(self, form: str) -> str:
        rest = (f"{operation} {number}" for operation, number in zip(self.operations, self.numbers[1:], strict=True))
        return " ".join([str(self.numbers[0]), *rest, ASKED[form]])

    def answer(self, form: str) -> str:
        shown = self.results if form == "written" else self.results[-1:]
        return " ".join(map(str, shown)) + " ."


def drawn(n: int, seed: int) -> list[Problem]:
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randint(BASE, (n, NUMBERS), generator=g).tolist()
    operations = torch.randint(len(OPERATIONS), (n, NUMBERS - 1), generator=g).tolist()
    pairs = zip(numbers, operations, strict=True)
    return [Problem(tuple(some), "".join(OPERATIONS[i] for i in others)) for some, others in pairs]


def tokenizer() -> Any:
    """A token a word, between spaces."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token=".", padding_side="left")


def inputs(problems: Sequence[Problem], form: str) -> dict[str, Tensor]:
    """Ids [n, words], and labels of the answers alone."""
    texts = [f"{problem.prompt(form)} {problem.answer(form)}" for problem in problems]
    ids = torch.tensor([[WORDS.index(word) for word in text.split()] for text in texts])
    labels = ids.clone()
    labels[:, : 2 * NUMBERS] = -100
    return {"input_ids": ids, "labels": labels}


def write_tasks(problems: Sequence[Problem], folder: Path) -> None:
    """A YAML file and its rows for each form: the last word before the full stop has to be right."""
    for form in ASKED:
        rows = [{"prompt": one.prompt(form), "answer": str(one.results[-1])} for one in problems]
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": form,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{form}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": NUMBERS, "do_sample": False},
            "filter_list": [
                {
                    "name": "last",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"(\d+)", "group_select": -1},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{form}.yaml").write_text(json.dumps(task))  # which is YAML


@dataclass
class Harness:
    """Shares of right last results by lm-eval: of the written form, and in `direct` the other's."""

    folder: Path  # of write_tasks
    direct: float = 0.0  # of what was scored last

    def __call__(self, model: nn.Module) -> float:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        known = TaskManager(include_path=str(self.folder), include_defaults=False)
        asked: Any = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=100)
        done = simple_evaluate(model=asked, tasks=list(ASKED), task_manager=known, log_samples=False, bootstrap_iters=0)
        found = {form: float(done["results"][form]["exact_match,last"]) for form in ASKED}
        self.direct = found["direct"]
        return found["written"]


def task(seed: int, options: Options, asked: Sequence[Problem], held: Sequence[Problem], harness: Harness) -> Task:
    """asked: what lm-eval asks; held: what thresholds are placed on. Neither is learnt from."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 4 * NUMBERS, **SIZES}
    marks = {"pad_token_id": 0, "eos_token_id": WORDS.index("."), "bos_token_id": None}
    apart = {*asked, *held}

    def batch(step: int, n: int) -> list[Problem]:
        return [problem for problem in drawn(n, seed * 1_000_003 + step) if problem not in apart]

    def loss(model: nn.Module, step: int) -> Tensor:
        form = tuple(ASKED)[step % 2]
        found: Tensor = model(**inputs(batch(step, options.batch), form)).loss
        return found

    def read(problems: Sequence[Problem], form: str) -> dict[str, Tensor]:
        return {"input_ids": inputs(problems, form)["input_ids"]}

    facts = {"example": "10_reasoning", "data": f"lm-eval: {NUMBERS} numbers mod {BASE}", "model": "LlamaForCausalLM"}
    return Task(
        model=LlamaForCausalLM(LlamaConfig(initializer_range=0.05, **marks, **sizes)),
        loss=loss,
        score=harness,
        batches=[read(batch(-1 - i, 256), form) for i in range(2) for form in ASKED],
        held_out=[read(held, form) for form in ASKED],
        facts={**facts, "metric": "right, steps written", "seed": seed, **here("lm_eval")},
    )


def by_chance(problems: Sequence[Problem]) -> float:
    """Share of the last result that most problems have."""
    return max(Counter(problem.results[-1] for problem in problems).values()) / len(problems)


def main(options: Options = OPTIONS) -> None:
    rows = []
    for seed in options.seeds:
        problems = list(dict.fromkeys(drawn(2 * (TESTED + HELD_OUT), 10**9 + seed)))
        asked, held = problems[:TESTED], problems[TESTED : TESTED + HELD_OUT]
        with tempfile.TemporaryDirectory() as folder:
            write_tasks(asked, Path(folder))
            harness = Harness(Path(folder))
            work = task(seed, options, asked, held, harness)
            often = row(work, side="most frequent", value=by_chance(asked), seconds=0.0)
            rows += both(often, often.value)
            for found in compare(work, options):
                rows += both(found, harness.direct)
                print(
                    f"seed {seed} {found.side} {found.target:.0%} {found.stage}: {found.value:.3f} {harness.direct:.3f}"
                )
        keep(rows)


def both(written: Row, direct: float) -> list[Row]:
    return [written, replace(written, metric="right, direct", value=direct, seconds=0.0)]


if __name__ == "__main__":
    main()
