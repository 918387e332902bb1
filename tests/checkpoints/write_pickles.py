"""Writes the pickles and programs here with the code of the day: `python -m tests.checkpoints.write_pickles FOLDER`.

They hold the dotted names that the code had then, which later code must still find. Only classes of torch besides ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import ltepass

D, F = 16, 40


def aligned() -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D)) for _ in range(2)]
    return nn.Sequential(blocks[0], nn.LayerNorm(D), blocks[1])


def graph() -> nn.Module:
    return torch.fx.symbolic_trace(aligned())


def inline() -> nn.Module:
    layer = nn.TransformerDecoderLayer(D, 2, F, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 1)


def main(folder: Path) -> None:
    x = torch.randn(2, 8, D, generator=torch.Generator().manual_seed(0))
    for make, inputs in ((inline, {"tgt": x, "memory": x.flip(0)}), (graph, {"input": x}), (aligned, {"input": x})):
        torch.manual_seed(0)
        model = make().eval()
        ltepass.transform(model, inputs, ltepass.LTEConfig(group_size=5), calibration=[inputs])
        ltepass.set_mode(model, "hard")
        expected: Tensor = model(**inputs).detach()
        torch.save({"model": model, "inputs": inputs, "expected": expected}, folder / f"{make.__name__}.pt")
        ltepass.lower(model)
        torch.save({"model": model, "inputs": inputs, "expected": expected}, folder / f"{make.__name__}_lowered.pt")
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), folder / "program.pt2")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
