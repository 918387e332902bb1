"""`lte+teal`: LTE with `ltepass.set_hidden_sparsity`, at the sparsity of the FFN that the table asks for.

Of an active expert's hidden units, the smallest share is left out of the down projection: TEAL's rule inside LTE.
"""

from __future__ import annotations

from typing import Any

import torch
from study import Measured, measure_lte
from torch import Tensor, nn

from ltepass.sites import FFNSite

SHARE = 0.55  # of the active experts' hidden units: of .4, .55 and .7 the best on SmolLM2 at 50 % (preset cpu)


def expert_sparsity(matrices: int, sparsity: float, share: float = SHARE) -> float:
    """What routers may leave out, so that with the cut the FFN of 2 or 3 matrices is at `sparsity`."""
    return 1.0 - (1.0 - sparsity) / (1.0 - share / matrices)


def n_matrices(site: FFNSite) -> int:
    return 3 if site.gate else 2


def measure_cut(model: Any, test: dict[str, Tensor]) -> Measured:
    """As `measure_lte`, with what `down` is spared: units that are exactly 0 are not read."""
    sites: list[FFNSite] = model._lte.sites
    kept: list[Tensor] = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append((args[0] != 0).float().mean())

    handles = [model.get_submodule(site.down).register_forward_pre_hook(count) for site in sites]
    ppl, sparsity, read = {}, {}, {}
    matrices = n_matrices(sites[0])
    for name, blocks in test.items():
        kept.clear()
        one, inactive, share = measure_lte(model, {name: blocks})
        active = 1.0 - inactive[name]
        ffn = ((matrices - 1) * active + float(torch.stack(kept).mean())) / matrices
        ppl[name], sparsity[name], read[name] = one[name], 1.0 - ffn, ffn + share[name] - active
    for handle in handles:
        handle.remove()
    return ppl, sparsity, read
