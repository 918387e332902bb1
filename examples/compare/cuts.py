"""LTE with cuts on what active experts read, at the FFN sparsity that the table asks for: TEAL's rule inside LTE.

`lte+teal` leaves the smallest hidden units of active experts out of down (`ltepass.set_hidden_sparsity`); `lte+cuts`
leaves the smallest inputs out of up and gate as well (`ltepass.set_input_sparsity`). Routers then leave out less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ltepass
from examples.compare.measured import Measured, OnText, measure_lte
from ltepass.routed.sites import FFNSite


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """hidden: share of active experts' hidden units; inputs: share of the FFN's inputs."""

    hidden: float = 0.0
    inputs: float = 0.0

    def apply(self, model: nn.Module, batches: tuple[Tensor, ...]) -> None:
        if self.hidden:
            ltepass.set_hidden_sparsity(model, self.hidden, batches)
        if self.inputs:
            ltepass.set_input_sparsity(model, self.inputs, batches)

    def kept(self, matrices: int) -> float:
        """Share of an active expert's weights that are read."""
        return ((matrices - 1) * (1 - self.inputs) + 1 - self.hidden) / matrices


# The pair that choose_cuts.py finds least on held-out text (results/cuts.md); lte+teal is it without the inputs.
CUTS = {"lte": Cuts(), "lte+teal": Cuts(hidden=0.55), "lte+cuts": Cuts(hidden=0.55, inputs=0.3)}


def expert_sparsity(matrices: int, sparsity: float, cuts: Cuts) -> float:
    """What routers may leave out, so that with the cuts the FFN of 2 or 3 matrices is at `sparsity`."""
    return max(0.0, 1.0 - (1.0 - sparsity) / cuts.kept(matrices))


def n_matrices(site: FFNSite) -> int:
    return 3 if site.gate else 2


def measure_cut(model: Any, test: dict[str, Tensor]) -> Measured:
    """As `measure_lte`, with what up, gate and down are spared: inputs and units that are exactly 0 are not read."""
    sites: list[FFNSite] = model._lte.sites
    seen: dict[str, list[Tensor]] = {"inputs": [], "hidden": []}

    def count(kept: list[Tensor]) -> Any:
        return lambda module, args: kept.append((args[0] != 0).float().mean())

    handles = []
    for site in sites:
        for name, path in (("inputs", site.up), ("hidden", site.down)):
            handles.append(model.get_submodule(path).register_forward_pre_hook(count(seen[name])))
    found: Measured = {}
    matrices = n_matrices(sites[0])
    for text, blocks in test.items():
        for kept in seen.values():
            kept.clear()
        lte = measure_lte(model, {text: blocks})[text]
        active = 1.0 - lte.sparsity
        inputs, hidden = (float(torch.stack(kept).mean()) for kept in seen.values())
        ffn = ((matrices - 1) * active * inputs + hidden) / matrices
        found[text] = OnText(losses=lte.losses, sparsity=1.0 - ffn, bytes_share=ffn + lte.bytes_share - active)
    for handle in handles:
        handle.remove()
    return found
