"""What a public call makes of its model, for tests of what it hands that down to."""

from __future__ import annotations

from torch import nn

from ltepass.routed.routed import Routed


def routed(model: nn.Module) -> Routed:
    return Routed.trained(model, "this test")
