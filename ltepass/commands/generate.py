"""`ltepass generate`: a saved model, lowered, continues a text; or an exported folder does, where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import ltepass
from ltepass.commands.load import load, require_device, tokenizer_of
from ltepass.errors import ConfigError
from ltepass.exporting.folder import ABOUT
from ltepass.routed.routed import is_transformed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    folder: str,
    prompt: str,
    *,
    new_tokens: int = 64,
    sparsity: float | None = None,
    device: str = "cpu",
    exported: bool = False,
) -> str:
    """The prompt and its greedy continuation by a saved model, routed or dense, lowered. Raises ConfigError.

    exported: the folder is one of `ltepass export`, whose machine code then runs.
    """
    if new_tokens < 1:
        raise ConfigError(f"--new-tokens is {new_tokens}; expected 1 or more")
    _check(Path(folder), sparsity, device, exported=exported)
    tokenizer = tokenizer_of(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].numel() == 0:
        raise ConfigError(f"the prompt {prompt!r} has no token; expected some text to continue")
    if exported:
        return _exported(Path(folder), tokenizer, prompt, new_tokens)
    model = load(folder, device)
    routed = is_transformed(model)
    if sparsity is not None and not routed:
        raise ConfigError(f"--sparsity was given, and {folder} holds no routers; expected what `ltepass train` writes")
    if sparsity is not None:
        ltepass.set_sparsity(model, sparsity)
    ltepass.lower(model, scope="ffn", ffn=routed)
    out = model.generate(**inputs.to(device), max_new_tokens=new_tokens, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


def _check(folder: Path, sparsity: float | None, device: str, *, exported: bool) -> None:
    """A folder runs as a program only where the user says that it is one."""
    if not exported and (folder / ABOUT).exists() and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} was exported: it holds machine code; where you trust it, add --exported to run it")
    if exported and sparsity is not None:
        raise ConfigError("--sparsity was given, and an exported folder has the one it was exported with")
    if exported and device != "cpu":
        raise ConfigError(f"--device is {device!r}, and an exported folder runs on the CPU; expected cpu")
    require_device(device)


def _exported(folder: Path, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    from ltepass.exporting.run_exported import ExportedDecoder

    ids = tokenizer(prompt)["input_ids"]
    new = list(ExportedDecoder(folder).generate(ids, new_tokens))
    text: str = tokenizer.decode(ids + new, skip_special_tokens=True)
    return text
