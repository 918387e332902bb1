"""What a router's calls leave for the losses and for sparsity, and whose rows those are. Nothing here decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ltepass.routed.soft_losses import per_token_losses, union_per_token
from ltepass.routed.token_masks import Forward, TokenRows


class Losses(NamedTuple):
    """Of a call in soft mode, a value per row each, fp32; soft_sparsity without gradients."""

    efficiency: Tensor
    separability: Tensor
    union: Tensor
    soft_sparsity: Tensor


class RecordedCall(NamedTuple):
    """One call of an FFN with gradients.

    inactive: hard sparsity per row. forward: what is known of which rows are tokens. losses: None in hard mode.
    """

    inactive: Tensor
    forward: Forward
    losses: Losses | None = None


@dataclass(eq=False)
class Recorder:
    """Beside one router, the same in all modes. Calls in soft mode are recorded whoever makes them.

    count_inactive: those in hard mode are too. share_neighbours: of soft calls the union term is. A stage sets both.
    calls: until a loss takes them; the last one alone where nobody counts.
    rows: which rows of a call are tokens, while somebody counts them; None otherwise.
    """

    count_inactive: bool = False
    share_neighbours: bool = False
    rows: TokenRows | None = None
    calls: list[RecordedCall] = field(default_factory=list)

    def emptied(self) -> Recorder:
        """For a copy of the router: without what belongs to one forward, which no copy can take."""
        return Recorder(self.count_inactive, self.share_neighbours)

    def record_logits(self, logits: Tensor, threshold: Tensor, *, tau: float | None) -> None:
        """logits: [..., n_experts]. tau: where soft mode's losses have it; None in hard mode, which has none."""
        inactive = (logits.detach() <= threshold).float().mean(-1)
        self.record(inactive, None if tau is None else self._losses(logits, tau))

    def record(self, inactive: Tensor, losses: Losses | None = None) -> None:
        """One call more: its inactive share a row, and the losses of soft mode."""
        if self.rows is None:
            self.calls.clear()
        # Checkpointing runs a layer again inside the backward pass: all of it, but it is the same call.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not again:
            forward = Forward() if self.rows is None else self.rows.forward
            self.calls.append(RecordedCall(inactive, forward, losses))

    def _losses(self, logits: Tensor, tau: float) -> Losses:
        efficiency, separability = per_token_losses(logits, tau)
        union = union_per_token(logits) if self.share_neighbours else torch.zeros_like(efficiency)
        return Losses(efficiency, separability, union, 1.0 - torch.sigmoid(logits.detach()).mean(-1))
