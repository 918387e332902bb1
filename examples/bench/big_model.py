"""`python -m examples.bench.big_model`: memory that transform, calibrate and lower take beyond a 7B model's weights.

LLaMA-2-7B's shape in bfloat16, of random weights, on one CPU; `--shape 1b` or `small` for less. `--disk FOLDER` leaves
every other layer there, by a `device_map`: weights are then those in memory, and FFNs on disk are computed
masked-dense. The command fails where the process ever held more than --limit GB beyond its weights.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ltepass
from ltepass.errors import LoweringError
from ltepass.measure.machine import machine
from ltepass.measure.memory import resident

# hidden size, FFN, layers, vocabulary
SHAPES = {"7b": (4096, 11008, 32, 32000), "1b": (2048, 8192, 16, 32000), "small": (512, 1536, 4, 4096)}
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the process holds after one step, and at most so far. over_weights_gb: the most, without the weights."""

    run: str
    shape: str
    on_disk: bool
    tokens: int  # of the calibration
    step: str
    seconds: float
    weights_gb: float  # in memory, before transform
    now_gb: float
    peak_gb: float
    over_weights_gb: float
    machine: str
    versions: str


def made(shape: str) -> Any:
    """A model whose weights are drawn once and repeated: to draw each costs minutes, and nothing here reads them."""
    hidden, ffn, layers, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    for number, parameter in enumerate(model.parameters()):
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(drawn)):
            part = flat[start : start + len(drawn)]
            part.copy_(drawn.roll(997 * (number + start // len(drawn)))[: len(part)])
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
    return model.eval()


def half_on_disk(shape: str, folder: Path) -> Any:
    """The same, of which every other layer stays on disk."""
    if not (folder / "config.json").exists():
        made(shape).save_pretrained(folder)
    layers = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(SHAPES[shape][2])}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=layers | rest, dtype=torch.bfloat16, offload_folder=str(folder / "offloaded")
    ).eval()


def lowered(model: nn.Module) -> None:
    """Where all FFNs carry hooks that fetch weights, none is lowered."""
    ltepass.set_mode(model, "hard")
    try:
        ltepass.lower(model)
    except LoweringError as left:
        print(left)


class Meter:
    """Steps of one run, printed as they end."""

    def __init__(self, same: dict[str, Any]) -> None:
        self.same, self.weights, self.steps = same, 0, list[Step]()

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        (now, peak), weights = resident(), self.weights
        gb = {"weights_gb": weights, "now_gb": now, "peak_gb": peak, "over_weights_gb": peak - weights}
        seconds = round(time.monotonic() - began, 1)
        rounded = {name: round(size / GB, 2) for name, size in gb.items()}
        self.steps.append(Step(**{"step": step, "seconds": seconds, **rounded, **self.same}))
        row = self.steps[-1]
        print(f"{step}: {row.now_gb} GB now, {row.peak_gb} at most, {row.over_weights_gb} beyond weights; {seconds} s")


def measure(shape: str, tokens: int, disk: Path | None) -> list[Step]:
    """All steps, on batches of at most 512 random tokens."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    run = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    same = {"run": run, "shape": shape, "on_disk": disk is not None, "tokens": tokens}
    meter = Meter({**same, "machine": machine(), "versions": versions})
    ids = torch.randint(0, SHAPES[shape][3], (1, tokens), generator=torch.Generator().manual_seed(0))
    model = half_on_disk(shape, disk) if disk else made(shape)
    meter.weights = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    with meter("load"):
        pass
    with meter("transform"):
        ltepass.transform(model)
    with meter("calibrate"):
        ltepass.calibrate(model, list(ids.split(512, 1)))
    with meter("lower"):
        lowered(model)
    with meter("generate"):
        model.generate(ids[:, :8], max_new_tokens=2, do_sample=False, pad_token_id=0)
    return meter.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--disk", type=Path, help="every other layer stays in this folder")
    parser.add_argument("--limit", type=float, default=2.0, help="GB beyond weights")
    parser.add_argument("--out", type=Path, help="rows are added to this CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*keep the order of their neurons")
    steps = measure(args.shape, args.tokens, args.disk)
    if args.out:
        fresh = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Step)], lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerows(map(asdict, steps))
    if steps[-1].over_weights_gb > args.limit:
        sys.exit(f"the process held {steps[-1].over_weights_gb} GB beyond its weights; expected at most {args.limit}")


if __name__ == "__main__":
    main()
