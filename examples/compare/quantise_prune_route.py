"""Should I quantise, prune or route? Quality against the measured time of a token, and against memory, on one machine.

    python -m examples.compare.quantise_prune_route --preset smoke                  some minutes: the tiny model
    python -m examples.compare.quantise_prune_route --preset smollm2 --work DIR     half an hour and more on 2 cores

SmolLM2-135M off its grid (`off_grid.py`), for its own weights come from a 4-bit file. Every point is made of it with
the same calibration tokens, and nothing is trained: the tiers are those of `bits.py`, whose folder is taken from --work
where that has run there. Ours are folders of `ltepass export`; llama.cpp (`pip install 'ltepass[compare]'`) reads the
same weights. What a library that is not installed would hold is left out. All take turns in one run, on one thread and
on two. Perplexity is over dense fp32 on three texts, one of the calibration's domain and two outside it. Quality is
kept as it is measured; times come at the end, all of them.

Pruning is structured: the neurons that add least, by the mean square of what each writes, are gone for every token.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

import ltepass
from examples.compare import bits, models
from examples.compare.quantise_prune_route_page import THREADS, Kind, Row, draw, read, write
from ltepass.commands.load import load
from ltepass.corpora import python_docs, token_blocks
from ltepass.exporting.folder import ABOUT, WEIGHTS, is_gated
from ltepass.exporting.run_exported import ExportedDecoder
from ltepass.kernels.weight_formats import Format
from ltepass.measure import gguf_file
from ltepass.measure.bench_tokens import PREFILL_TOKENS, Text, bench_tokens
from ltepass.measure.llama_cpp import LlamaCpp as Program
from ltepass.measure.machine import machine
from ltepass.measure.quality import losses_of, ratio_of_perplexities, token_losses
from ltepass.measure.sides.exported_side import Exported, logits_of_steps
from ltepass.measure.sides.llama_cpp_side import LlamaCpp
from ltepass.measure.sides.side import Side
from ltepass.measure.sides.transformers_side import Transformers
from ltepass.passes.capture.decoder_step import WITHIN
from ltepass.routed.routed import Routed, routers_of
from ltepass.routed.router import Router

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel

CSV = Path("examples/results/quantise_prune_route.csv")
TOKENS = 24  # timed in a turn


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model to measure. source: its folder below --work, or the format of llama.cpp's file. linears, shortlist: as
    `ltepass export` has them; sparsity: for the knob.
    """

    kind: Kind
    source: str
    linears: Format | None = None
    sparsity: float | None = None
    shortlist: int | None = None

    @property
    def name(self) -> str:
        if self.source == "GPTQ" and self.kind == "quantised":
            return "FFNs by GPTQ in 4 bits, int8"
        if self.source == "int4":
            return "linears by GPTQ in int4, head int8"
        if self.kind == "llama.cpp":
            return f"llama.cpp {self.source}"
        share = "" if self.sparsity is None else f", {self.sparsity:.0%} inactive"
        some = "" if self.shortlist is None else f", shortlist of {self.shortlist}"
        return f"{NAMES.get(self.source, self.source)}{share}, {self.linears or 'F32'}{some}"

    def exported(self, work: Path) -> Path:
        return work / "exported" / self.name.replace(", ", "-").replace(" ", "-").replace("%", "")


NAMES = {  # of sources
    "GPTQ": "tiers, none at zero",
    "tiers int4": "tiers, none at zero, attention in int4",
    "linear": "experts of 8",
    "linear int4": "experts of 8, by GPTQ in int4",
}
FORMATS: tuple[Format | None, ...] = (None, "int8", "int4")
SHORTLIST = 1024
PRUNED = (20,)  # percent of the neurons of each FFN
POINTS = (
    *(Point(kind="quantised", source="dense", linears=linears) for linears in FORMATS),
    Point(kind="quantised", source="dense", linears="int8", shortlist=SHORTLIST),
    Point(kind="quantised", source="int4", linears="int8"),
    Point(kind="quantised", source="GPTQ", linears="int8", sparsity=bits.MOST),
    *(Point(kind="llama.cpp", source=name) for name in ("F32", "BF16", "Q8_0", "Q4_1", "Q4_0")),
    *(Point(kind="pruned", source=f"pruned {percent} %", linears="int8") for percent in PRUNED),
    *(Point(kind="routed", source=source, linears="int8", sparsity=0.5) for source in ("linear", "linear int4")),
    *(Point(kind="routed", source="proxies", linears="int8", sparsity=s) for s in (0.5, 0.7)),
    *(Point(kind="tiers", source="tiers", linears="int8", sparsity=s) for s in (0.8, 0.95)),
    *(Point(kind="tiers", source="GPTQ", linears="int8", sparsity=s) for s in (0.9, 0.95)),
    Point(kind="tiers", source="GPTQ", linears="int8", sparsity=0.95, shortlist=SHORTLIST),
    *(Point(kind="tiers", source="tiers int4", linears="int8", sparsity=s) for s in (0.9, 0.95)),
)

NEEDS = {
    "llama_cpp": [point for point in POINTS if point.kind == "llama.cpp"],
    "torchao": [point for point in POINTS if point.source.endswith("int4")],
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """As those of `bits.py`; rounds: of turns."""

    texts: bits.Preset
    rounds: int
    points: tuple[Point, ...] = POINTS


PRESETS = {
    "smoke": Preset(texts=bits.PRESETS["smoke"], rounds=1, points=tuple({p.kind: p for p in POINTS}.values())),
    "smollm2": Preset(texts=bits.PRESETS["smollm2"], rounds=5),
}


def make(preset: Preset, work: Path) -> None:
    """What is not there yet: a folder of each source, and one of each export."""
    texts = preset.texts
    tokenizer = models.tokenizer(texts.model)
    calibration, _, _ = bits.texts_of(texts, tokenizer)
    _, dense = bits.dense_of(texts, calibration, work)
    calibrated = partial(bits.calibrated_tiers, dense, calibration, work)
    written: dict[str, Callable[[Path], object]] = {
        "dense": dense.save_pretrained,
        "int4": lambda folder: ltepass.quantize(copy.deepcopy(dense), "int4", calibration).save_pretrained(folder),
        "GPTQ": lambda folder: _none_at_zero(calibrated()).save_pretrained(folder),
        "tiers int4": lambda folder: ltepass.quantize(_none_at_zero(calibrated()), "int4", calibration).save_pretrained(
            folder
        ),
        "linear": lambda folder: _experts(dense, calibration).save_pretrained(folder),
        "linear int4": lambda folder: ltepass.quantize(
            _experts(dense, calibration), "int4", calibration
        ).save_pretrained(folder),
        "proxies": lambda folder: _proxies(dense, calibration).save_pretrained(folder),
        **{f"pruned {n} %": partial(_write_pruned, dense, calibration, n / 100) for n in PRUNED},
        "tiers": lambda _: calibrated(),
    }
    for point in preset.points:
        folder = work / point.source
        if point.kind == "llama.cpp":
            if not _gguf(point, work).exists():
                gguf_file.write(dense, _gguf(point, work), point.source)
            continue
        if not (folder / "config.json").exists():
            written[point.source](folder)
        tokenizer.save_pretrained(folder)
        if not (point.exported(work) / ABOUT).exists():
            _export(point, work)


def _none_at_zero(tiers: PreTrainedModel) -> PreTrainedModel:
    """Tiers of which no neuron is at zero: the high planes are read whole. At a sparsity of 0.99 that is GPTQ alone."""
    Routed.of(tiers, "GPTQ").config["low_bit_sparsity"] = 0.0
    for router in routers_of(tiers):
        router.low_bit_sparsity = 0.0  # type: ignore[assignment]  # a TieredRouter's
    return tiers


def _experts(dense: LlamaForCausalLM, calibration: list[Tensor]) -> PreTrainedModel:
    """Linear routers, fitted and not trained."""
    config = ltepass.LTEConfig(group_size=8, target_sparsity=0.5)
    return ltepass.transform(copy.deepcopy(dense), config=config, calibration=calibration)


def _proxies(dense: LlamaForCausalLM, calibration: list[Tensor]) -> PreTrainedModel:
    config = ltepass.LTEConfig(router="proxy", target_sparsity=0.5)
    return ltepass.transform(copy.deepcopy(dense), config=config, calibration=calibration)


def _write_pruned(dense: LlamaForCausalLM, calibration: list[Tensor], share: float, folder: Path) -> None:
    pruned(dense, calibration, share).save_pretrained(folder)


def pruned(dense: LlamaForCausalLM, calibration: list[Tensor], share: float) -> PreTrainedModel:
    """A smaller dense model: of each FFN the neurons that write most stay."""
    energy = written_by_neuron(dense, calibration)
    config = transformers.LlamaConfig(**dense.config.to_dict())
    config.intermediate_size = round((1 - share) * dense.config.intermediate_size / 32) * 32  # int4 takes blocks
    small: LlamaForCausalLM = transformers.LlamaForCausalLM(config).eval()
    weights = dict(dense.state_dict())
    for i, written in enumerate(energy):
        kept = written.topk(config.intermediate_size).indices.sort().values
        path = f"model.layers.{i}.mlp"
        for name in ("gate_proj", "up_proj"):
            weights[f"{path}.{name}.weight"] = weights[f"{path}.{name}.weight"][kept]
        weights[f"{path}.down_proj.weight"] = weights[f"{path}.down_proj.weight"][:, kept]
    small.load_state_dict(weights)
    return small


@torch.no_grad()
def written_by_neuron(dense: LlamaForCausalLM, calibration: list[Tensor]) -> list[Tensor]:
    """By layer [d_ff]: the sum over tokens of |h_j down_j|^2."""
    energy = [torch.zeros(dense.config.intermediate_size) for _ in dense.model.layers]

    def seen(total: Tensor, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += inputs[0].square().flatten(0, -2).sum(0) * weight.square().sum(0)

    with ExitStack() as hooks:
        for layer, total in zip(dense.model.layers, energy, strict=True):
            hooks.enter_context(layer.mlp.down_proj.register_forward_pre_hook(partial(seen, total)))
        for batch in calibration:
            dense(input_ids=batch)
    return energy


def _gguf(point: Point, work: Path) -> Path:
    return work / f"{point.source}.gguf"


def _export(point: Point, work: Path) -> None:
    """Other sparsities of one source and format are the same programs with other thresholds."""
    programs = (point.source, point.linears, point.shortlist)
    alike = (p.exported(work) for p in POINTS if (p.source, p.linears, p.shortlist) == programs)
    made = next((folder for folder in alike if (folder / ABOUT).exists()), None)
    if made is None:
        _compile(point, work)
        return
    folder, model = point.exported(work), load(str(work / point.source))
    ltepass.set_sparsity(model, point.sparsity or 0.0)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    for path, router in model.named_modules():
        if isinstance(router, Router):
            weights[f"{WITHIN}.{path}.threshold"].copy_(router.threshold)
    torch.save(weights, folder / WEIGHTS)


def _compile(point: Point, work: Path) -> None:
    """In a process of its own, which gives all of its memory back."""
    words = ["export", str(work / point.source), str(point.exported(work))]
    words += [] if point.linears is None else ["--linears", point.linears]
    words += [] if point.sparsity is None else ["--sparsity", str(point.sparsity)]
    words += [] if point.shortlist is None else ["--shortlist", str(point.shortlist)]
    subprocess.run([sys.executable, "-m", "ltepass", *words], check=True)


def measure(preset: Preset, work: Path, out: Path) -> None:
    make(preset, work)
    rows = {row.method: row for row in read(out)}
    _, _, texts = bits.texts_of(preset.texts, models.tokenizer(preset.texts.model))
    blocks = {text: some for (text, _), some in texts.items()}
    dense = load(str(work / "dense"))
    base = {text: token_losses(dense, some) for text, some in blocks.items()}
    for point in preset.points:
        if point.name not in rows:
            ratios = {t: ratio_of_perplexities(_losses(point, work, some), base[t]) for t, some in blocks.items()}
            tokens = min(some.numel() for some in blocks.values())
            rows[point.name] = Row(kind=point.kind, method=point.name, ratios=ratios, tokens=tokens)
            write(out, list(rows.values()))
    _time(preset, work, rows)
    order = [point.name for point in POINTS]
    done = sorted(rows.values(), key=lambda row: order.index(row.method))
    write(out, done)
    draw(done, out.with_suffix(".svg"))


def _losses(point: Point, work: Path, blocks: Tensor) -> Tensor:
    """[n, T - 1] of blocks [n, T], of what a user would run."""
    if point.kind == "llama.cpp":
        program = Program(_gguf(point, work), threads=torch.get_num_threads(), length=blocks.shape[1])
        losses = losses_of(program.logits, blocks)
        program.close()
        return losses
    if point.shortlist is not None:  # which an exported step has alone
        return losses_of(partial(logits_of_steps, ExportedDecoder(point.exported(work))), blocks)
    model = load(str(work / point.source))
    gated = any(routers_of(model))
    if gated and point.sparsity is not None:
        ltepass.set_sparsity(model, point.sparsity)
    return token_losses(ltepass.lower(model, ffn=gated, linears=point.linears), blocks)


def _time(preset: Preset, work: Path, rows: Mapping[str, Row]) -> None:
    """Fills in the rows: all points in turns, in one run."""
    sides: list[Side] = [_side(point, work) for point in preset.points]
    _, held_out = python_docs()
    prompt = min(64, preset.texts.length)
    ids = token_blocks(models.tokenizer(preset.texts.model), held_out, PREFILL_TOKENS, 1)[0]
    text = Text(ids=ids, tokens=TOKENS, blocks=ids[None, :prompt], prompt_tokens=prompt)
    name = preset.texts.model
    for records in bench_tokens(sides, text, model=name, threads=THREADS, rounds=preset.rounds):
        for point, record in zip(preset.points, records, strict=True):
            row = rows[point.name]
            row.ms[record.threads] = record.ms, record.p20_ms, record.p80_ms
            row.read_mb, row.resident_mb = record.weight_mb, record.resident_mb
            row.machine, row.torch, row.ltepass = machine(), record.torch, record.ltepass


def _side(point: Point, work: Path) -> Side:
    if point.kind == "llama.cpp":
        return LlamaCpp(path=_gguf(point, work))
    folder = point.exported(work)
    source = Transformers(load=partial(load, str(work / point.source)), routed=True) if is_gated(folder) else None
    return Exported(folder=folder, source=source)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="smoke")
    parser.add_argument("--work", type=Path, default=Path("quantise-prune-route"), help="a folder for some gigabytes")
    parser.add_argument("--out", type=Path, default=CSV)
    parser.add_argument("--only-make", action="store_true", help="measure nothing")
    asked = parser.parse_args(arguments)
    preset = PRESETS[asked.preset]
    lacking = [point for name, points in NEEDS.items() if importlib.util.find_spec(name) is None for point in points]
    preset = replace(preset, points=tuple(point for point in preset.points if point not in lacking))
    if asked.only_make:
        make(preset, asked.work)
    else:
        measure(preset, asked.work, asked.out)


if __name__ == "__main__":
    main()
