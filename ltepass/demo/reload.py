"""Loads the saved model in another process, with nothing but `import ltepass`, and compares its logits bit by bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from ltepass.demo.results import Reloaded

if TYPE_CHECKING:
    pass

PROGRAM = """
import sys
import ltepass
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

model_dir, reference, output, threads, device = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(model_dir).to(device)
with torch.no_grad():
    logits = model(input_ids=load_file(reference)["ids"].to(device), use_cache=False).logits
save_file({"logits": logits.cpu().contiguous()}, output)
"""


def compare(model_dir: Path, reference: Path, scratch: Path, device: str) -> Reloaded:
    """reference holds `ids` [1, T] and the `logits` [1, T, vocab] that the model gave before it was saved."""
    saved = load_file(reference)
    arguments = [str(model_dir), str(reference), str(scratch), str(torch.get_num_threads()), device]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the new process could not load {model_dir}:\n{done.stderr}")
    ours, theirs = saved["logits"], load_file(scratch)["logits"]
    scratch.unlink()
    return {"equal": torch.equal(ours, theirs), "max_difference": (ours - theirs).abs().max().item()}
