"""What a shortlist costs: of a head in 8 bits the rows that a scan in 4 bits says are best, of the others the scan.

    python -m examples.compare.shortlists --preset smoke       seconds: the tiny model
    python -m examples.compare.shortlists --preset smollm2     SmolLM2-135M as it comes and off its grid; two minutes

The decoder stays in floats, its head alone changes (`ltepass.export(shortlist=...)`). Every next token of three texts
is asked for: how often the best logit is another one's than with all rows in 8 bits, and perplexity over that head's,
with the 95 % interval of paired differences per block. `int4` reads all rows in 4 bits and none in 8.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from examples.compare import bits, models
from examples.compare.frontier_rows import Rows, write_rows
from examples.compare.off_grid import off_grid
from ltepass.kernels import shortlist as _shortlist  # noqa: F401 -- registers the op
from ltepass.kernels.weight_formats import int4_rows, quantise_int8
from ltepass.measure.machine import machine
from ltepass.measure.quality import Ratio, next_token_losses, ratio_of_perplexities

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CSV = Path("examples/results/shortlists.csv")
FIELDS = "model head share text domain other_best ratio low high tokens machine torch transformers".split()
ROWS = (16, 64, 256, 1024)
Head = Callable[[Tensor], Tensor]  # [T, d_model] -> logits [T, vocab]


def heads(weight: Tensor) -> dict[str, tuple[Head, float]]:
    """Of a head [vocab, d_model], and the share of the bytes in 8 bits that a token reads. All rows in 8 bits first."""
    codes, scale = quantise_int8(weight)
    scan, scan_scale = int4_rows(weight)
    ops, whole, scanned = torch.ops.ltepass, codes.nbytes + scale.nbytes, scan.nbytes + scan_scale.nbytes
    found: dict[str, tuple[Head, float]] = {"int8": (lambda x: ops.linear_int8(x, codes, scale, None), 1.0)}
    for rows in ROWS:
        call = partial(_call, ops.linear_shortlist, codes, scale, scan, scan_scale, rows)
        found[f"shortlist {rows}"] = (call, scanned / whole + min(rows / len(codes), 1.0))
    found["int4"] = (lambda x: ops.linear_int4(x, scan, scan_scale, None, None), scanned / whole)
    return found


def _call(op: Callable[..., Tensor], *weights: object) -> Tensor:
    *parts, x = weights
    return op(x, *parts)


@torch.no_grad()
def measured(model: PreTrainedModel, blocks: Tensor) -> dict[str, tuple[float, Ratio]]:
    """By head, of blocks [n, T]: how often another logit is the best than in int8, and perplexity over int8."""
    made = heads(model.get_output_embeddings().weight.detach())
    losses: dict[str, list[Tensor]] = {name: [] for name in made}
    others = dict.fromkeys(made, 0)
    for block in blocks:
        hidden = model.base_model(input_ids=block[None]).last_hidden_state[0, :-1]
        best = None
        for name, (head, _) in made.items():
            logits = head(hidden)
            best = logits.argmax(-1) if best is None else best
            others[name] += int((logits.argmax(-1) != best).sum())
            losses[name].append(next_token_losses(logits, block))
    base = torch.stack(losses["int8"])
    asked = base.numel()
    return {n: (others[n] / asked, ratio_of_perplexities(torch.stack(some), base)) for n, some in losses.items()}


def measure(preset: bits.Preset, work: Path, out: Path) -> None:
    calibration, _, texts = bits.texts_of(preset, models.tokenizer(preset.model))
    dense = models.load(preset.model, work, torch.cat(calibration))
    named = {preset.model: dense}
    if preset.model == "smollm2":
        named["smollm2, off its grid"] = off_grid(dense)
    rows = [row for row in Rows(out).read() if row["model"] not in named]
    for name, model in named.items():
        shares = {head: share for head, (_, share) in heads(model.get_output_embeddings().weight.detach()).items()}
        for (text, domain), blocks in texts.items():
            for head, (other, ratio) in measured(model, blocks).items():
                rows.append(
                    {
                        "model": name,
                        "head": head,
                        "share": f"{shares[head]:.3f}",
                        "text": text,
                        "domain": domain,
                        "other_best": f"{other:.4f}",
                        "ratio": f"{ratio.value:.4f}",
                        "low": f"{ratio.low:.4f}",
                        "high": f"{ratio.high:.4f}",
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
        "# What a shortlist of a head's rows costs",
        "",
        "Made by `examples/compare/shortlists.py` from the CSV beside it; nothing here is typed. The head alone "
        "changes: a token reads all of its rows in 4 bits, and those of the largest logits in 8 "
        "(`ltepass.export(shortlist=...)`). Another best logit than with all rows in 8 bits, in percent of tokens; and "
        "perplexity over that head's, with the 95 % interval of paired differences per block. Bytes: of the head, over "
        "all rows in 8 bits.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        here = [row for row in rows if row["model"] == model]
        texts = dict.fromkeys((row["text"], row["domain"]) for row in here)
        lines += ["", f"## {model}", "", f"{int(here[0]['tokens']):,} tokens a text; {here[0]['machine']}.", ""]
        lines += ["| head | bytes | " + " | ".join(f"{text} ({domain})" for text, domain in texts) + " |"]
        lines += ["|---|---|" + "---|" * len(texts)]
        for head in dict.fromkeys(row["head"] for row in here):
            mine = {(row["text"], row["domain"]): row for row in here if row["head"] == head}
            cells = " | ".join(_cell(mine[text]) for text in texts)
            lines.append(f"| {head} | {float(next(iter(mine.values()))['share']):.0%} | {cells} |")
    return "\n".join([*lines, ""])


def _cell(row: dict[str, str]) -> str:
    ratio = Ratio(value=float(row["ratio"]), low=float(row["low"]), high=float(row["high"]))
    return f"{100 * float(row['other_best']):.2f} %, {ratio}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=bits.PRESETS, default="smoke")
    parser.add_argument("--work", type=Path, default=Path("shortlists"), help="where the tiny model is kept")
    parser.add_argument("--out", type=Path, default=CSV)
    asked = parser.parse_args(arguments)
    measure(bits.PRESETS[asked.preset], asked.work, asked.out)


if __name__ == "__main__":
    main()
