"""How far rounding alone moves a routed model: a decision compares a score with a threshold, and a score that rounding
carries over it changes what later layers see.

    python -m examples.compare.rounding --preset smoke       seconds: the tiny model
    python -m examples.compare.rounding --preset smollm2     SmolLM2-135M off its grid; five minutes on a core

Every model runs over the same text as it is, in eager, then with its embeddings times 1 + 2^-23 (the next larger
float32, or the one after), then lowered. Lowering is right where it moves logits no further than that does. Nothing
is trained; `bits.py` keeps the tiers, which are read from its --work.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

import ltepass
from examples.compare import bits, models
from examples.compare.frontier_rows import Rows, write_rows
from ltepass.measure.machine import machine
from ltepass.routed.routed import is_transformed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CSV = Path("examples/results/rounding.csv")
FIELDS = "model method sparsity change divergence other_best ratio tokens machine torch transformers".split()
CHANGES = ("inputs one unit larger", "lowered")
ONE_UNIT = 1 + 2.0**-23


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Of one block. divergence: KL in nats a token; other_best: the share of tokens whose best logit is another one's;
    loss: nats a token more.
    """

    divergence: float
    other_best: float
    loss: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor, ids: Tensor) -> Moved:
        """before, after: logits [T, V]; ids: [T]."""
        a, b = before.double().log_softmax(-1), after.double().log_softmax(-1)
        at = torch.arange(len(ids) - 1), ids[1:]
        return cls(
            divergence=float((a.exp() * (a - b)).sum(-1).mean()),
            other_best=float((a.argmax(-1) != b.argmax(-1)).double().mean()),
            loss=float((a[:-1][at] - b[:-1][at]).mean()),
        )


def gated(dense: PreTrainedModel, calibration: list[Tensor], work: Path) -> Iterator[tuple[str, PreTrainedModel]]:
    """Dense itself first."""
    yield "dense", dense
    for router in ("linear", "proxy"):
        config = ltepass.LTEConfig(router=router, target_sparsity=0.5)
        yield router, ltepass.transform(copy.deepcopy(dense), config=config, calibration=calibration)
    yield "tiers", bits.calibrated_tiers(dense, calibration, work)


@torch.no_grad()
def moved(model: PreTrainedModel, blocks: Tensor) -> dict[str, list[Moved]]:
    """By change; of each of the blocks [n, T]."""
    routed = is_transformed(model)
    if routed:
        ltepass.set_mode(model, "hard")
    lowered = ltepass.lower(copy.deepcopy(model), ffn=routed)
    found: dict[str, list[Moved]] = {change: [] for change in CHANGES}
    for ids in blocks:
        before = model(input_ids=ids[None]).logits[0]
        inputs = model.get_input_embeddings()(ids[None]) * ONE_UNIT
        after = model(inputs_embeds=inputs).logits[0], lowered(input_ids=ids[None]).logits[0]
        for change, logits in zip(CHANGES, after, strict=True):
            found[change].append(Moved.of(before, logits, ids))
    return found


def measure(preset: bits.Preset, work: Path, out: Path) -> None:
    tokenizer = models.tokenizer(preset.model)
    calibration, _, texts = bits.texts_of(preset, tokenizer)
    name, dense = bits.dense_of(preset, calibration, work)
    blocks = next(iter(texts.values()))[:4]
    rows = [row for row in Rows(out).read() if row["model"] != name]
    for method, model in gated(dense, calibration, work):
        for sparsity in (0.0,) if method == "dense" else (0.5, 0.8):
            if sparsity:
                ltepass.set_sparsity(model, sparsity)
            for change, found in moved(model, blocks).items():
                rows.append(
                    {
                        "model": name,
                        "method": method,
                        "sparsity": f"{sparsity:g}",
                        "change": change,
                        "divergence": f"{statistics.fmean(m.divergence for m in found):.2e}",
                        "other_best": f"{statistics.fmean(m.other_best for m in found):.4f}",
                        "ratio": f"{math.exp(statistics.fmean(m.loss for m in found)):.4f}",
                        "tokens": str(blocks.numel()),
                        "machine": machine(),
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                    }
                )
                write_rows(out, FIELDS, rows)
                out.with_suffix(".md").write_text(page(rows))


def page(rows: Sequence[dict[str, str]]) -> str:
    lines = [
        "# How far rounding alone moves a routed model",
        "",
        "Made by `examples/compare/rounding.py` from the CSV beside it; nothing here is typed. Each model against "
        "itself in eager: embeddings times 1 + 2^-23, a unit or two in the last place, and lowered. Divergence: KL in "
        "nats a token. Other best: of tokens, those whose largest logit is another one's. Ratio: of perplexities.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        lines += ["", f"## {model}", "", f"{int(here[0]['tokens']):,} tokens; {here[0]['machine']}.", ""]
        lines += ["| | inactive | change | divergence | other best | ratio |", "|---|---|---|---|---|---|"]
        for row in here:
            share = f"{float(row['other_best']):.2%}"
            what = f"{row['method']} | {float(row['sparsity']):.0%} | {row['change']}"
            lines.append(f"| {what} | {row['divergence']} | {share} | x{row['ratio']} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=bits.PRESETS, default="smoke")
    parser.add_argument("--work", type=Path, default=Path("bits"), help="where models are kept")
    parser.add_argument("--out", type=Path, default=CSV)
    asked = parser.parse_args(arguments)
    measure(bits.PRESETS[asked.preset], asked.work, asked.out)


if __name__ == "__main__":
    main()
