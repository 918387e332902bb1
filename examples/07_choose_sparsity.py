"""Choose a sparsity: perplexity over sparsity of one calibrated model, as a table, a plot and a page.

Writes sparsity.svg and report.html. No training: the same curve of a trained model is flatter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ltepass
from ltepass.pages.plots import curves

SPARSITIES = (0.0, 0.2, 0.4, 0.6, 0.8)
MOST = 1.10  # of the perplexity of dense, that a sparsity may cost here


def batch(seed: int, rows: int = 16, length: int = 32) -> Tensor:
    """Token ids [rows, length]: sequences that count up by 1, 2 or 3 from where they start, modulo the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    start, step = torch.randint(0, 64, (rows, 1), generator=g), torch.randint(1, 4, (rows, 1), generator=g)
    return (start + step * torch.arange(length)) % 64


def dense_model() -> Any:
    """In the place of a model of yours."""
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        ids = batch(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    model, held_out = dense_model(), batch(-1)
    dense = ltepass.perplexity(model, held_out)
    config = ltepass.LTEConfig(router="proxy")  # of single neurons; needs no training
    ltepass.transform(model, config=config, calibration=[batch(step) for step in range(1000, 1008)])
    ltepass.set_mode(model, "hard")
    points = []
    print(f"{'asked for':>10} {'inactive':>10} {'perplexity':>11}   over dense")
    for asked in SPARSITIES:
        ltepass.set_sparsity(model, asked)
        shares = ltepass.measure_sparsity(model, [held_out])
        inactive, value = sum(shares.values()) / len(shares), ltepass.perplexity(model, held_out)
        points.append((100 * inactive, value))
        print(f"{asked:10.0%} {inactive:10.1%} {value:11.3f}   x{value / dense:.3f}")
    Path("sparsity.svg").write_text(curves({"proxy": points}, "inactive neurons (%)", "perplexity", points=True))

    chosen = max(s for s, (_, value) in zip(SPARSITIES, points, strict=True) if value <= MOST * dense)
    ltepass.set_sparsity(model, chosen)
    Path("report.html").write_text(ltepass.report(model, batches=[held_out]).to_html(f"at {chosen:.0%}"))
    print(f"most within x{MOST:.2f} of dense: {chosen:.0%}; sparsity.svg has the curve, report.html who is used there")


if __name__ == "__main__":
    main()
