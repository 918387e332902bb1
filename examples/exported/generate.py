"""Decode with a folder of `ltepass export`, by torch and tokenizers alone: python generate.py FOLDER "A text" [N]."""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch._inductor import aoti_load_package

if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
    raise SystemExit(__doc__)
folder, text, new_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 64
about = json.loads((folder / "decoder.json").read_text())
torch.ops.load_library(folder / "ops.so")  # names our ops and brings their kernels; not where ltepass is imported
weights = torch.load(folder / "weights.pt", weights_only=True, mmap=True)
graphs = [aoti_load_package(str(folder / name)) for name in ("decode.pt2", "prefill.pt2")]
for graph in graphs:
    mine = {name: weights[name] for name in graph.get_constant_fqns()}
    graph.load_constants(mine, check_full_update=True, user_managed=True)

cache = torch.empty(about["cache"], dtype=getattr(torch, about["cache_dtype"]))
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ids = tokenizer.encode(text).ids
new, position = ids, 0
while len(ids) < about["cache"][4] and new_tokens > 0 and new[-1] not in about["eos"]:
    logits = graphs[len(new) > 1](torch.tensor([new]), torch.tensor(position), cache)
    position, new, new_tokens = len(ids), [int(logits.argmax())], new_tokens - 1
    ids = ids + new
print(tokenizer.decode(ids))
