"""An exported folder decodes without ltepass, and without Python: the tokens are those of transformers' generate.

Compiles two graphs, and a C++ program where there is g++: a minute of one core.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ltepass

LOOPS = Path(__file__).resolve().parent / "exported"
PROMPT, NEW = [1, 2, 3, 4], 12


def compiled(folder: Path) -> Path:
    """generate.cpp, built as its first lines say."""
    torch_folder = Path(torch.__file__).parent
    program = folder / "generate"
    includes = [f"-I{torch_folder / 'include' / more}" for more in (".", "torch/csrc/api/include")]
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    source = str(LOOPS / "generate.cpp")
    subprocess.run(["g++", "-std=c++20", "-O1", source, "-o", str(program), *includes, *libraries], check=True)
    return program


def main() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, eos_token_id=None, **sizes)).eval()
    ltepass.transform(model, config=ltepass.LTEConfig(group_size=8, grouping="identity"))
    ltepass.set_mode(model, "hard")
    prompt = torch.tensor([PROMPT])
    expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, len(PROMPT) :].tolist()
    print("transformers:", *expected)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exported"
        ltepass.export(model, folder, length=64)
        print("the folder:  ", *sorted(path.name for path in folder.iterdir()))
        loop = ltepass.exported_loop(folder)
        ours = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, custom_generate=loop)
        assert ours[0, len(PROMPT) :].tolist() == expected
        if shutil.which("g++") is None:
            print("no g++: generate.cpp was not compiled")
            return
        command = [str(compiled(Path(scratch))), str(folder), str(NEW), *map(str, PROMPT)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print("without Python:", *said)
        assert [int(word) for word in said] == expected


if __name__ == "__main__":
    main()
