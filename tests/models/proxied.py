"""Models with proxy routers, small enough for a test."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import ltepass
from ltepass.routed.proxy_router import ProxyRouter
from ltepass.routed.routed import Routed
from ltepass.routed.router import Router
from tests.models import zoo


@zoo.made_once
def proxied(name: str = "llama", **settings: Any) -> nn.Module:
    model = zoo.build(name)
    config = ltepass.LTEConfig(router="proxy", **settings)
    return ltepass.transform(model, None if name in zoo.HF else zoo.ids(), config, calibration=[zoo.ids(4, 16)])


def routers(model: nn.Module) -> list[ProxyRouter]:
    found = Routed.of(model, "the test").routers
    assert all(isinstance(router, ProxyRouter) for router in found)
    return found  # type: ignore[return-value]


def masks(model: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []

    def see(router: Router, _: object, logits: Tensor) -> None:
        seen.append(logits > router.threshold)

    handles = [router.register_forward_hook(see) for router in routers(model)]
    zoo.logits(model)
    for handle in handles:
        handle.remove()
    return seen
