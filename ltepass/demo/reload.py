"""The other process: loads the saved model, with nothing but `import ltepass`, and writes its logits.

`python -m ltepass.demo.reload MODEL_DIR INPUT OUTPUT THREADS`; INPUT holds `ids` [1, T], OUTPUT gets `logits`
[1, T, vocab].
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[1, T, vocab] on the CPU."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.cpu().contiguous()


def compare(model_dir: Path, reference: Path, scratch: Path) -> dict[str, Any]:
    """Runs this module in a new process on reference's `ids` and compares with its `logits`, bit by bit."""
    saved = load_file(reference)
    command = [sys.executable, "-m", __spec__.name, str(model_dir), str(reference), str(scratch)]
    done = subprocess.run([*command, str(torch.get_num_threads())], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the new process could not load {model_dir}:\n{done.stderr}")
    ours, theirs = saved["logits"], load_file(scratch)["logits"]
    scratch.unlink()
    return {"equal": torch.equal(ours, theirs), "max_difference": (ours - theirs).abs().max().item()}


def main() -> None:
    from transformers import AutoModelForCausalLM

    import ltepass  # noqa: F401  # all that a user's program adds

    model_dir, reference, output, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    saved = load_file(reference)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    save_file({"logits": logits_of(model, saved["ids"])}, output)


if __name__ == "__main__":
    main()
