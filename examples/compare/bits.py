"""Bits of FFN weights that a token reads, against quality, before any training and after a little.

    python -m examples.compare.bits --preset smoke       a minute: the tiny model
    python -m examples.compare.bits --preset smollm2     SmolLM2-135M off its grid (`off_grid.py`); half an hour

Every method changes FFNs alone; the rest stays in fp32. Rounding takes blocks of 32 along a row with an fp16 scale
each, the best of a few clips; int8 and Q4_1 are what llama.cpp and others have. Tiers are
`LTEConfig(inactive="low_bit")`: p is the share of neurons that read the low plane too, q of those that read the high
plane of down, and p = 0 is its quantiser, GPTQ, alone. Codes and tables come from text of one domain; columns say what
each text costs over dense, with the 95 % interval of paired differences per block. Rows go to bits.csv as they are
measured, the page is made from them.

Trained tiers: one hard stage at TRAINED_AT, on text of the calibration's domain, that learns the dense model's own
logits and no label: codes stay, what is no FFN learns around them. Dense as it is stays what they are measured against,
and one checkpoint serves all points.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import ltepass
from examples.compare import models
from examples.compare.frontier_rows import Rows, write_rows
from examples.compare.off_grid import off_grid
from ltepass.corpora import other_texts, python_docs, token_blocks
from ltepass.kernels.weight_formats import dequantise_int4, dequantise_int8, quantise_int4, quantise_int8
from ltepass.measure.machine import machine
from ltepass.measure.quality import Ratio, ratio_of_perplexities, token_losses
from ltepass.routed.routed import is_transformed, routers_of
from ltepass.routed.sites import FFNSite

CSV = Path("examples/results/bits.csv")
FIELDS = "model method bits held text domain ratio low high tokens machine torch transformers".split()
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)
BLOCK = 32
MOST = 0.99  # a sparsity
TRAINED_AT = (0.05, 0.6)
LEARNING_RATE = 1e-4
TIERS = (  # (p, q); some for a round number of bits on SmolLM2: 3.5, 4.5, 5 and 6
    *((0.0, 1.0), (0.05, 0.27), (0.05, 0.6), (0.05, 0.95), (0.05, 1.0), (0.1, 0.6), (0.1, 1.0)),
    *((0.15, 1.0), (0.2, 0.6), (0.2, 1.0), (0.39, 1.0)),
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """blocks of `length` tokens of each text; calibration: blocks of training text for codes and tables; steps: of
    training, a block each, of text behind the calibration's.
    """

    model: str
    blocks: int
    length: int
    calibration: int
    steps: int


PRESETS = {
    "smoke": Preset(model="tiny", blocks=8, length=64, calibration=16, steps=4),
    "smollm2": Preset(model="smollm2", blocks=8, length=512, calibration=16, steps=60),
}


def rounded(weight: Tensor, bits: int) -> Tensor:
    """weight: [n, d], d a multiple of 32 -> the nearest of 2^bits - 1 levels in blocks of 32, symmetric."""
    most = 2 ** (bits - 1) - 1
    blocks = weight.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    best, error = blocks, torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        scale = (clip * largest / most).half().float().clamp_min(torch.finfo(torch.float16).tiny)
        tried = (blocks / scale).round().clamp(-most, most) * scale
        lost = (tried - blocks).square().sum(-1, keepdim=True)
        best, error = torch.where(lost < error, tried, best), torch.minimum(lost, error)
    flat: Tensor = best.flatten(-2)
    return flat


def _int8(weight: Tensor) -> Tensor:
    return dequantise_int8(*quantise_int8(weight))


def _q4_1(weight: Tensor) -> Tensor:
    return dequantise_int4(*quantise_int4(weight, with_minimum=True))


ROUNDED: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "int8, a scale a row": (8.0, _int8),
    "Q4_1": (5.0, _q4_1),
    **{f"rounded to {bits} bits": (bits + 16 / BLOCK, partial(rounded, bits=bits)) for bits in (6, 5, 4, 3)},
}


@dataclass(frozen=True)
class Made:
    """A model to measure. bits: read a weight of the FFNs by a token; held: for that."""

    method: str
    model: Any
    bits: float
    held: float


def methods(dense: Any, calibration: list[Tensor], train: Tensor, work: Path) -> Iterator[Made]:
    gated = calibrated_tiers(dense, calibration, work)
    sites = ltepass.report(gated).sites
    for name, (size, change) in ROUNDED.items():
        yield Made(name, _changed(dense, sites, change), size, size)
    ltepass.set_mode(gated, "hard")
    for p, q in TIERS:
        bits = _set_tiers(gated, p, q)
        yield Made(f"tiers of int8 x, p {p:g}, q {q:g}" if p else "GPTQ of inactive units, int8 x", gated, *bits)
    gated = trained_tiers(gated, dense, train, work)
    for p, q in TIERS[1:]:
        yield Made(f"tiers trained on {train.numel():,} tokens, p {p:g}, q {q:g}", gated, *_set_tiers(gated, p, q))


def calibrated_tiers(dense: Any, calibration: list[Tensor], work: Path) -> Any:
    """Made once, then read from the folder. As it is saved, the better 60 % of all neurons read down."""
    folder = work / "tiers"
    if not (folder / "config.json").exists():
        config = ltepass.LTEConfig(router="proxy", inactive="low_bit", target_sparsity=0.9, low_bit_sparsity=0.4)
        model: Any = ltepass.transform(copy.deepcopy(dense), config=config, calibration=calibration)
        model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def trained_tiers(gated: Any, dense: Any, train: Tensor, work: Path) -> Any:
    """Made once, then read from the folder."""
    folder = work / "tiers-trained"
    if not (folder / "config.json").exists():
        _distil(gated, dense, train, work)
        gated.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _set_tiers(gated: Any, p: float, q: float) -> tuple[float, float]:
    """Both shares, from the tables; (read, held) bits."""
    for router in routers_of(gated):
        router.low_bit_sparsity = 1.0 - q  # type: ignore[assignment]  # a TieredRouter's
    ltepass.set_sparsity(gated, min(1.0 - p, MOST))
    if p == 0.0:
        for router in routers_of(gated):
            router.threshold.fill_(math.inf)
    return tier_bits(gated, p, q)


def _distil(gated: Any, dense: Any, train: Tensor, work: Path) -> None:
    """A hard stage at TRAINED_AT on the blocks of train [n, T], taught by the dense model alone."""
    _set_tiers(gated, *TRAINED_AT)
    options: Any = {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    args = transformers.TrainingArguments(
        str(work / "training"),
        per_device_train_batch_size=1,
        max_steps=len(train),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    rows = [{"input_ids": block, "labels": block} for block in train]
    lte = ltepass.LTESettings(soft_steps=0, distill=1.0, target_sparsity=1.0 - TRAINED_AT[0])
    ltepass.LTETrainer(model=gated, args=args, train_dataset=rows, lte=lte, teacher=dense).fit()
    gated.eval()


@torch.no_grad()
def _changed(dense: Any, sites: list[FFNSite], change: Callable[[Tensor], Tensor]) -> Any:
    model = copy.deepcopy(dense)
    for site in sites:
        for path in (site.up, site.gate, site.down):
            if path is not None:
                linear = model.get_submodule(path)
                linear.weight.copy_(change(linear.weight))
    return model


def tier_bits(gated: Any, p: float, q: float) -> tuple[float, float]:
    """(read, held), from the tensors themselves: the high plane of gate and up whole, shares of the others."""
    read, held, weights = 0.0, 0, 0
    for router in routers_of(gated):
        operands = [t.nbytes for t in router.operands() if t is not None]
        down, low = (sum(t.nbytes for t in planes) for planes in (router.planes_of_down(), router.low_planes()))
        read += sum(operands) + q * down + p * low
        held += sum(operands) + down + low
        weights += 3 * router.d_ff * router.d_model  # gated FFNs
    return 8 * read / weights, 8 * held / weights


def texts_of(preset: Preset, tokenizer: Any) -> tuple[list[Tensor], Tensor, dict[tuple[str, str], Tensor]]:
    """Calibration batches, blocks to train on, and blocks by (text, domain)."""
    train, held_out = python_docs()
    texts = {("Python reference", "calibration"): held_out, **{(n, "outside"): t for n, t in other_texts().items()}}
    read = token_blocks(tokenizer, train, preset.length, preset.calibration + preset.steps)
    calibration, more = read[: preset.calibration], read[preset.calibration :]
    blocks = {key: token_blocks(tokenizer, text, preset.length, preset.blocks) for key, text in texts.items()}
    return list(calibration.split(4)), more, blocks


def dense_of(preset: Preset, calibration: list[Tensor], work: Path) -> tuple[str, Any]:
    """What rows call it, and the model; SmolLM2's weights come from a 4-bit file, and are taken off its grid."""
    dense = models.load(preset.model, work, torch.cat(calibration))
    return ("smollm2, off its grid", off_grid(dense)) if preset.model == "smollm2" else (preset.model, dense)


def measure(preset: Preset, work: Path, out: Path, only: str = "") -> None:
    """only: in the names of the methods that are measured."""
    rows = Rows(out).read()
    tokenizer = models.tokenizer(preset.model)
    calibration, train, blocks = texts_of(preset, tokenizer)
    name, dense = dense_of(preset, calibration, work)
    base = {key: token_losses(dense, some) for key, some in blocks.items()}
    tokens = str(min(some.numel() for some in blocks.values()))
    known = {r["method"] for r in rows if (r["model"], r["tokens"]) == (name, tokens)}
    for made in methods(dense, calibration, train, work):
        if made.method in known or only not in made.method:
            continue
        for (text, domain), some in blocks.items():
            ratio = ratio_of_perplexities(losses(made.model, some), base[text, domain])
            rows.append(
                {
                    "model": name,
                    "method": made.method,
                    "bits": f"{made.bits:.2f}",
                    "held": f"{made.held:.2f}",
                    "text": text,
                    "domain": domain,
                    "ratio": f"{ratio.value:.4f}",
                    "low": f"{ratio.low:.4f}",
                    "high": f"{ratio.high:.4f}",
                    "tokens": tokens,
                    "machine": f"{machine()}, {torch.get_num_threads()} thread(s)",
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                }
            )
        write_rows(out, FIELDS, rows)
        out.with_suffix(".md").write_text(page(rows))
        print(f"{made.method}: {made.bits:.2f} bits", flush=True)


def losses(model: Any, blocks: Tensor) -> Tensor:
    """[n, T - 1] of blocks [n, T], through the kernel where there are routers: it takes a third of the time."""
    if not is_transformed(model):
        return token_losses(model, blocks)
    try:
        return token_losses(ltepass.lower(model), blocks)
    finally:
        ltepass.unlower(model)


def _ratio(row: dict[str, str]) -> str:
    return str(Ratio(value=float(row["ratio"]), low=float(row["low"]), high=float(row["high"])))


def page(rows: list[dict[str, str]]) -> str:
    lines = [
        "# Bits of FFN weights against quality, before any training and after a little",
        "",
        "Made by `examples/compare/bits.py` from the CSV beside it; nothing here is typed. Perplexity over dense fp32, "
        "with the 95 % interval of paired differences per block. Codes and tables come from text of the calibration "
        "domain. Rows `tiers, p ..` are of codes of down that make up for what all units lose, as calibration made "
        "them once; now inactive units make up for each other alone. Both were made with x in floats; rows `of int8 x` "
        "take a token as codes of 8 bits, as tiers are defined now. Rows `tiers trained` are one checkpoint that "
        "learned the dense model's logits, and no label, on other text of the calibration domain.",
    ]
    for model, tokens in dict.fromkeys((r["model"], r["tokens"]) for r in rows):
        here = [r for r in rows if (r["model"], r["tokens"]) == (model, tokens)]
        texts = dict.fromkeys((r["text"], r["domain"]) for r in here)
        head = " | ".join(f"{text} ({domain})" for text, domain in texts)
        lines += ["", f"## {model}", "", f"{int(tokens):,} tokens a text; {here[0]['machine']}.", ""]
        lines += [f"| method | bits read | bits held | {head} |", "|---|---|---|" + "---|" * len(texts)]
        order = dict.fromkeys(r["method"] for r in sorted(here, key=lambda r: -float(r["bits"])))
        for method in order:
            mine = {(r["text"], r["domain"]): r for r in here if r["method"] == method}
            first = next(iter(mine.values()))
            cells = " | ".join(_ratio(mine[text]) for text in texts)
            lines.append(f"| {method} | {first['bits']} | {first['held']} | {cells} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--work", type=Path, default=Path("bits"), help="where the tiny model is kept")
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--blocks", type=int, help="of each text; the preset's without it")
    parser.add_argument("--only", default="", help="methods with this in their names")
    asked = parser.parse_args()
    preset = PRESETS[asked.preset]
    preset = replace(preset, blocks=asked.blocks or preset.blocks)
    measure(preset, asked.work, asked.out, asked.only)


if __name__ == "__main__":
    main()
