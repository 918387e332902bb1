"""`python -m examples.bench.whole_token`: a token of exported models beside llama.cpp, and the page of the results.

SmolLM2-135M (its package), and random weights in the shapes of Qwen2.5-0.5B and Llama-3.2-1B; routers are calibrated,
not trained: how fast a token is does not depend on that. What it needs is made below --work, and kept there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import ltepass
from examples.bench import speed_page
from ltepass.corpora import python_docs, token_blocks
from ltepass.demo.smollm import load_smollm2

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARSITIES = ("0.5", "0.8")
CHARACTERS = {"text": 5000, "long-text": 14000}
LONG = 2000  # tokens before those that are timed, for what depends on keys and values
FORMATS = {"float32": "F32", "bfloat16": "BF16"}
QUANTISED = {"int8": "Q8_0", "int4": "Q4_0"}  # ours, and llama.cpp's of as many bits


def smollm2() -> PreTrainedModel:
    return load_smollm2()[0]


def qwen_shape() -> PreTrainedModel:
    """Qwen2.5-0.5B's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def llama_shape() -> PreTrainedModel:
    """Llama-3.2-1B's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True, kw_only=True)
class Model:
    """dtypes: that are measured, as the export names them; the first is what the folders hold. blocks: for the
    perplexity, which random weights have none of."""

    name: str
    make: Callable[[], PreTrainedModel]
    dtypes: tuple[str, ...]
    blocks: int = 0
    grouping: str = "identity"  # of random weights: one is as good as another, and this takes no time

    def exports(self) -> dict[str, list[str]]:
        """Name of a folder -> what `ltepass export` makes it of: dense, or with its routers."""
        dense = {dtype: ["dense", "--dtype", dtype] for dtype in self.dtypes}
        bits = {format: ["dense", "--linears", format, "--dtype", self.dtypes[0]] for format in QUANTISED}
        gated = product(self.dtypes, SPARSITIES)
        for format in QUANTISED:
            sparse = ["gated", "--linears", format, "--dtype", self.dtypes[0], "--sparsity"]
            bits |= {f"{format}-{s}": [*sparse, s] for s in SPARSITIES}
        cached = {f"{self.dtypes[0]}-cache-bfloat16": [*dense[self.dtypes[0]], "--cache-dtype", "bfloat16"]}
        return dense | cached | bits | {f"{d}-{s}": ["gated", "--dtype", d, "--sparsity", s] for d, s in gated}

    @property
    def formats(self) -> str:
        """llama.cpp's."""
        return ",".join([*(FORMATS[dtype] for dtype in self.dtypes), *QUANTISED.values()])


MODELS = (
    Model(name="smollm2-calibrated", make=smollm2, dtypes=("float32", "bfloat16"), blocks=8, grouping="auto"),
    Model(name="qwen2.5-0.5b-shape", make=qwen_shape, dtypes=("float32", "bfloat16")),
    Model(name="llama-3.2-1b-shape", make=llama_shape, dtypes=("bfloat16",)),
)


def make(model: Model, work: Path) -> None:
    """What is not there yet: work/text, /dense, /gated and a folder for each export."""
    train, held_out = python_docs()
    work.mkdir(parents=True, exist_ok=True)
    for name, characters in CHARACTERS.items():
        (work / name).write_text(held_out[:characters])
    if not (work / "gated").exists():
        _, tokenizer = load_smollm2()  # of all: no token of its text is beyond the others' vocabularies
        for name in ("dense", "gated"):
            network = model.make()
            if name == "gated":  # in fp32: in bf16, without instructions for it, calibration takes an hour of a core
                config = ltepass.LTEConfig(target_sparsity=0.5, group_size=8, grouping=model.grouping)
                batches = token_blocks(tokenizer, train, 128, 24).split(4)
                ltepass.transform(network, config=config, calibration=list(batches))
                ltepass.set_mode(network, "hard")
            network.to(getattr(torch, model.dtypes[0])).save_pretrained(work / name)
            tokenizer.save_pretrained(work / name)
        del network
    for name, (source, *options) in model.exports().items():
        if not (work / name / "decoder.json").exists():
            _ltepass("export", str(work / source), str(work / name), *options)


def measure(model: Model, work: Path, options: Sequence[str]) -> None:
    """All exports after a short prompt; after a long one those that differ in how keys and values are kept."""
    names, first = model.exports(), model.dtypes[0]
    short = [name for name in names if "cache" not in name]
    long = [name for name in names if name.startswith(first) and names[name][0] == "dense"]
    _measure(model, work, "text", short, [*options, "--formats", model.formats])
    _measure(model, work, "long-text", long, [*options, "--formats", FORMATS[first], "--prompt-tokens", str(LONG)])


def _measure(model: Model, work: Path, text: str, folders: Sequence[str], options: Sequence[str]) -> None:
    exported = [word for name in folders for word in ("--exported", str(work / name))]
    rows = ["--name", model.name, "--against", "llama.cpp", "--out", str(speed_page.TOKEN_CSV)]
    asked = [*options, "--blocks", str(model.blocks)]
    _ltepass("bench", "model", str(work / "gated"), str(work / text), *rows, *asked, *exported)


def _ltepass(*words: str) -> None:
    """In a process of its own, which gives all of its memory back."""
    subprocess.run([sys.executable, "-m", "ltepass", *words], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("whole-token"), help="a folder for some gigabytes")
    parser.add_argument("--models", nargs="*", default=[m.name for m in MODELS], choices=[m.name for m in MODELS])
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--rounds", default="4")
    parser.add_argument("--tokens", default="24")
    parser.add_argument("--only-make", action="store_true", help="measure nothing")
    asked = parser.parse_args(arguments)
    for model in (m for m in MODELS if m.name in asked.models):
        make(model, asked.work / model.name)
        if not asked.only_make:
            options = ["--threads", asked.threads, "--rounds", asked.rounds, "--tokens", asked.tokens]
            measure(model, asked.work / model.name, options)
    speed_page.main()


if __name__ == "__main__":
    main()
