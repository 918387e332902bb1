"""Steer the efficiency coefficient eta so that the soft stage ends at the sparsity asked for.

The paper sets eta by hand and gets whatever sparsity follows. Here an integral controller moves log(eta) by how far the
measured hard sparsity lags behind a ramp that reaches the target before the stage ends.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ltepass.config import Budget
from ltepass.routed.routed import Routed


@dataclass
class SparsityController:
    """Steers eta, the coefficient of the efficiency loss (paper section 4.3), to a sparsity.

    Arguments:
        target: share of inactive experts, in [0, 1). eta: present coefficient.
        ramp: share of the stage after which the reference stands at the target. gain: change of log(eta) per step and
            unit of error. smooth: weight of a new measurement in the running mean (single batches are noisy).
        start, measured: first and running sparsity; None before the first step.
    Raises: nothing.
    Example:
        >>> controller = ltepass.SparsityController(target=0.7)
        >>> controller.update(0.4, progress=0.0) == 0.3  # on the reference
        True
        >>> controller.update(0.4, progress=0.5) > 0.3  # behind it
        True
    """

    target: float
    eta: float = 0.3
    ramp: float = 0.6
    gain: float = 2.0
    smooth: float = 0.3
    start: float | None = None
    measured: float | None = None

    ETA_MIN, ETA_MAX = 1e-3, 1e3

    def update(self, sparsity: float, progress: float) -> float:
        """sparsity: hard sparsity of this step's batch; progress: share of the stage done -> the next step's eta."""
        if self.start is None or self.measured is None:
            self.start = self.measured = sparsity
        self.measured += self.smooth * (sparsity - self.measured)
        reference = self.start + (self.target - self.start) * min(1.0, progress / self.ramp)
        eta = math.log(self.eta) + self.gain * (reference - self.measured)
        self.eta = min(self.ETA_MAX, max(self.ETA_MIN, math.exp(eta)))
        return self.eta

    def state_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> SparsityController:
        return SparsityController(**state)


def hold(routed: Routed, shares: Tensor, sparsity: float, *, budget: Budget | None = None, gain: float = 1.0) -> None:
    """Move thresholds a little towards a sparsity. shares: [n_sites], inactive share of each in the last step.

    budget: None takes the config's. gain: logits per unit of error; at logits of unit spread the error shrinks by about
    gain / 3 a step.
    """
    budget = budget or routed.config["budget"]
    error = sparsity - (shares.mean().expand_as(shares) if budget == "model" else shares)
    for router, missing in zip(routed.routers, error, strict=True):
        router.threshold.add_((gain * missing).to(router.threshold.device))
