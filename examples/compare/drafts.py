"""Assisted generation: how many of the proposed tokens a model accepts, from `ltepass.draft` and from prompt lookup.

    python -m examples.compare.drafts --preset smoke    the tiny model
    python -m examples.compare.drafts --preset cpu      SmolLM2-135M off its grid (`off_grid.py`); ten minutes on a core

Routers are calibrated on the same tokens, and nothing is trained. The model goes on with each prompt greedily, alone
and with help, in turns, lowered, on one thread; at sparsity 0 it is the dense model. Tokens of one check choose
neurons of their own, so that a check reads their union; the rows have it. Rows of other presets stay in the CSV.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import ltepass
from examples.compare import models
from examples.compare.frontier_rows import Row, Rows, write_rows
from examples.compare.off_grid import off_grid
from examples.compare.presets import PRESETS
from examples.compare.study import load_data
from ltepass.measure.machine import machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CSV = Path("examples/results/drafts.csv")
PROPOSED = 5  # tokens a check, at most
PROMPT = 64  # tokens
CALIBRATION = 8  # blocks of the preset's length
LOOKUP = "prompt lookup"
ROUTERS = {
    "linear": ltepass.LTEConfig(),
    "proxy": ltepass.LTEConfig(router="proxy"),
    "tiers": ltepass.LTEConfig(router="proxy", inactive="low_bit", target_sparsity=0.9),
}


class Case(NamedTuple):
    """draft: its sparsity; None is prompt lookup. Under tiers, 0.99 leaves all but a few neurons their 4-bit half."""

    router: str
    sparsity: float
    draft: float | None


CASES = (
    *(Case("linear", 0.0, draft) for draft in (None, 0.8)),
    *(Case("proxy", sparsity, draft) for sparsity, draft in ((0.0, 0.5), (0.0, 0.8), (0.5, None), (0.5, 0.8))),
    *(Case("tiers", sparsity, 0.99) for sparsity in (0.0, 0.5)),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model and its help. accepted: share of the proposed tokens; a_check: tokens of the text for one forward of
    the model; same: of the texts, those that are what the model says alone; memory: the draft's own bytes over the
    model's; faster: CPU time without help over that with it, the median of prompts; used, together: shares of neurons
    that one token and PROPOSED + 1 neighbours use in the model."""

    model: str
    router: str
    sparsity: float
    help: str
    prompts: int
    tokens: int  # new ones, of each prompt
    accepted: float
    a_check: float
    same: float
    memory: float
    faster: float
    used: float
    together: float
    machine: str
    torch: str
    transformers: str


FIELDS = [field.name for field in fields(Measured)]


@contextmanager
def forwards_of(model: nn.Module) -> Iterator[list[int]]:
    """Tokens that each forward reads."""
    read: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        read.append((args[0] if args else named["input_ids"]).shape[-1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def own_bytes(draft: nn.Module, model: nn.Module) -> float:
    """Bytes of a draft that are none of the model's, over the model's."""

    def held(of: nn.Module) -> dict[int, int]:
        stores = (tensor.untyped_storage() for tensor in chain(of.parameters(), of.buffers()))
        return {store.data_ptr(): store.nbytes() for store in stores}

    shared = held(model)
    return sum(size for at, size in held(draft).items() if at not in shared) / sum(shared.values())


def used(model: nn.Module, prompts: Tensor, window: int) -> float:
    """Share of neurons that a window of tokens uses, a mean of FFNs."""
    unused = ltepass.measure_union(model, [prompts], window)
    return 1.0 - statistics.fmean(unused.values())


def measured(name: str, model: PreTrainedModel, case: Case, prompts: Tensor, new: int) -> Measured:
    """model: calibrated, not lowered; prompts: [n, T], each followed by `new` tokens."""
    ltepass.set_mode(model, "hard")
    ltepass.set_sparsity(model, case.sparsity)
    one, together = (used(model, prompts, window) for window in (1, PROPOSED + 1))
    target = ltepass.lower(copy.deepcopy(model))
    target.generation_config.eos_token_id = None  # texts are of one length
    options: dict[str, object] = {"max_new_tokens": new, "do_sample": False}
    memory = 0.0
    if case.draft is None:
        helped = {**options, "prompt_lookup_num_tokens": PROPOSED}
    else:
        draft = ltepass.draft(target, case.draft)
        draft.generation_config.update(
            num_assistant_tokens=PROPOSED, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
        helped, memory = {**options, "assistant_model": draft}, own_bytes(draft, target)

    def continued(prompt: Tensor, how: Mapping[str, object]) -> tuple[Tensor, float]:
        """The text, and seconds of CPU: other processes take none of them."""
        began = time.process_time()
        ids = prompt[None]
        text = target.generate(ids, attention_mask=torch.ones_like(ids), **how)
        return text, time.process_time() - began

    continued(prompts[0], helped)  # the first call is slower
    checks = proposed = same = 0
    ratios = []
    for prompt in prompts:
        alone, seconds = continued(prompt, options)
        with forwards_of(target) as read:
            text, shorter = continued(prompt, helped)
        checks += len(read)
        proposed += sum(read) - len(prompt) - (len(read) - 1)  # each but the first reads one token of the text
        same += torch.equal(text, alone)
        ratios.append(seconds / shorter)
    made = len(prompts) * new
    return Measured(
        model=name,
        router=case.router,
        sparsity=case.sparsity,
        help=LOOKUP if case.draft is None else f"draft at {case.draft:.0%}",
        prompts=len(prompts),
        tokens=new,
        accepted=round((made - checks) / max(proposed, 1), 3),
        a_check=round(made / checks, 2),
        same=same / len(prompts),
        memory=round(memory, 5),
        faster=round(statistics.median(ratios), 3),
        used=round(one, 3),
        together=round(together, 3),
        machine=machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def rows_of(
    name: str, dense: PreTrainedModel, calibration: Tensor, prompts: Tensor, new: int, cases: Sequence[Case]
) -> Iterator[Measured]:
    """One model a router. calibration: [n, T] token ids."""
    for router in dict.fromkeys(case.router for case in cases):
        model = copy.deepcopy(dense)
        ltepass.transform(model, config=ROUTERS[router], calibration=calibration.split(2))
        for case in cases:
            if case.router == router:
                yield measured(name, model, case, prompts, new)


def measure(preset: str, work: Path, out: Path, count: int, new: int) -> None:
    """Rows and page as they come; count: prompts."""
    budget = replace(PRESETS[preset].budget, test=count)
    data = load_data(budget, None, models.tokenizer(budget.model), 0)
    dense, name = models.load(budget.model, work, data.train), budget.model
    if name == "smollm2":  # its weights come from a 4-bit file
        dense, name = off_grid(dense), "smollm2, off its grid"
    prompts = next(iter(data.test.values()))[:, :PROMPT]
    rows = [row for row in Rows(out).read() if row["model"] != name]
    for found in rows_of(name, dense, data.train[:CALIBRATION], prompts, new, CASES):
        print(found, flush=True)
        rows.append({key: str(value) for key, value in asdict(found).items()})
        write_rows(out, FIELDS, rows)
        out.with_suffix(".md").write_text(page(rows))


def page(rows: Sequence[Row]) -> str:
    lines = [
        "# What a model accepts of its helpers",
        "",
        "Made by `examples/compare/drafts.py` from the CSV beside it; nothing here is typed. Greedy `generate` with "
        "`assistant_model=ltepass.draft(model, sparsity)` or with prompt lookup, lowered, routers calibrated and not "
        f"trained, at most {PROPOSED} tokens proposed a check. Inactive 0% is the dense model; under tiers a neuron "
        "that is not active keeps its 4-bit half. Faster: CPU time of one thread, alone over helped, the median of "
        "prompts. Same: texts that are what the model says alone. Own memory: of the draft's tensors, those that are "
        f"not the model's. Neurons: what one token uses, and what {PROPOSED + 1} neighbours use together, which a "
        "check reads.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        first = here[0]
        lines += [
            "",
            f"## {model}",
            "",
            f"{first['prompts']} prompts, {first['tokens']} new tokens each; {first['machine']}, 1 thread.",
            "",
            "| router | inactive | help | accepted | tokens a check | faster | same | own memory | a token's neurons "
            f"| {PROPOSED + 1} tokens' |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in here:
            accepted, checked, faster = float(row["accepted"]), float(row["a_check"]), float(row["faster"])
            lines.append(
                f"| {row['router']} | {float(row['sparsity']):.0%} | {row['help']} | {accepted:.2f} | {checked:.2f} | "
                f"x{faster:.2f} | {float(row['same']):.0%} | {float(row['memory']):.2%} | {float(row['used']):.0%} | "
                f"{float(row['together']):.0%} |"
            )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="new ones, of each prompt")
    parser.add_argument("--work", type=Path, default=Path("frontier-work"), help="where the tiny model is kept")
    parser.add_argument("--out", type=Path, default=CSV)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measure(asked.preset, asked.work, asked.out, asked.prompts, asked.tokens)


if __name__ == "__main__":
    main()
