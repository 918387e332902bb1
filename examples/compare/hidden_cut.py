"""TEAL's rule inside LTE's experts: of an active expert's hidden units, the small ones are left out of `down` too.

    h = act(gate x) * (up x) of the active experts;  y = down (h * [|h| > cut])

A router knows only x, so it chooses whole experts; what it keeps in vain can be seen once h is there, unit by unit and
exactly, before a third of the bytes is read. No kernel of ltepass skips these rows of `down` yet: this is what the
frontier says that it would be worth.
"""

from __future__ import annotations

from typing import Any

import torch
from rules import quantile
from study import Measured, measure_lte
from torch import Tensor, nn

from ltepass.sites import FFNSite
from ltepass.sparsity import mode_of, run_batches

SHARE = 0.4  # of the active experts' hidden units: measured on SmolLM2, .3 costs nothing and .5 a few percent


def expert_sparsity(site: FFNSite, sparsity: float, share: float = SHARE) -> float:
    """What routers may leave out, so that with the cut the FFN is at `sparsity`."""
    matrices = 3 if site.gate else 2
    return 1.0 - (1.0 - sparsity) / (1.0 - share / matrices)


class HiddenCut:
    """One cut for each FFN of a transformed model, in force from `settle` until `take_off`, in training too.

    share: of the hidden units of active experts, left out on the batches of `settle`; in hard mode.
    """

    def __init__(self, model: nn.Module, share: float = SHARE) -> None:
        self.model, self.share = model, share
        self.sites: list[FFNSite] = model._lte.sites  # type: ignore[union-attr, assignment]
        self.cuts = [0.0] * len(self.sites)
        self.kept: list[Tensor] = []  # share of all hidden units that `down` reads, one value per forward in eval mode
        self.handles: list[Any] = []

    def settle(self, batches: list[Tensor]) -> None:
        """Cuts at the share's quantile of what active experts give on these batches, seen without cuts."""
        self.take_off()
        sizes: list[list[Tensor]] = [[] for _ in self.sites]

        def keep(i: int, h: Tensor) -> Tensor:
            size = h.abs()
            sizes[i].append(size[size > 0][::7].clone())  # a sample: the quantile is of one number in thousands
            return h

        handles = self._hook(keep)
        with mode_of(self.model, "hard"):
            run_batches(self.model, batches)
        for handle in handles:
            handle.remove()
        self.cuts = [quantile(torch.cat(s), self.share) for s in sizes]
        self.handles = self._hook(self._cut)

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _cut(self, i: int, h: Tensor) -> Tensor:
        on = h.detach().abs() > self.cuts[i]
        if not self.model.training:
            self.kept.append(on.float().mean())
        return h * on

    def _hook(self, function: Any) -> list[Any]:
        def before_down(i: int) -> Any:
            return lambda module, args: (function(i, args[0]), *args[1:])

        downs = [self.model.get_submodule(site.down) for site in self.sites]
        return [down.register_forward_pre_hook(before_down(i)) for i, down in enumerate(downs)]

    def measure(self, test: dict[str, Tensor]) -> Measured:
        """As `measure_lte`, with what `down` is spared."""
        ppl, sparsity, read = {}, {}, {}
        matrices = 3 if self.sites[0].gate else 2
        for name, blocks in test.items():
            self.kept.clear()
            one, inactive, share = measure_lte(self.model, {name: blocks})
            active = 1.0 - inactive[name]
            ffn = ((matrices - 1) * active + float(torch.stack(self.kept).mean())) / matrices
            ppl[name], sparsity[name], read[name] = one[name], 1.0 - ffn, ffn + share[name] - active
        return ppl, sparsity, read
